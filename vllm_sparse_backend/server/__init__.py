"""The live page at ``/sparse_prefill/`` of vLLM's own server: what is sparse, while it runs."""
