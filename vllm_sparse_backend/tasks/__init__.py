"""Prompts whose answers or losses tell dense attention from sparse; free of vLLM and torch."""
