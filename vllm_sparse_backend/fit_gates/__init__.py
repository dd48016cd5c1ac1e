"""`vllm-sparse fit-gates`: SeerAttention's gates, taught by a model's own attention."""
