"""Sparse prefill attention as plain functions of tensors. Knows nothing of vLLM's classes."""

from vllm_sparse_backend.ops.api import (
    paged_sparse_attention,
    select_tiles,
    sparse_attention,
)
from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.stats import AttentionStats
from vllm_sparse_backend.ops.tiles import TileList

__all__ = [
    "AttentionStats",
    "PolicyTable",
    "TileList",
    "paged_sparse_attention",
    "select_tiles",
    "sparse_attention",
]
