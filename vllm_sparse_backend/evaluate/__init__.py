"""Fidelity measured end to end: the same prompts through vLLM, dense and then sparse."""
