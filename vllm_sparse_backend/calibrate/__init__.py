"""Fit a profile to a model: exact errors of candidate policies, measured through vLLM itself."""
