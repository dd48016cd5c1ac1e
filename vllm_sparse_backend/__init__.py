"""Sparse prefill for vLLM: an attention backend, and the ops under it.

The ops are imported at first use: importing this package costs neither torch nor a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparse_backend.ops import paged_sparse_attention, sparse_attention

__version__ = "0.1.0"
__all__ = ["__version__", "paged_sparse_attention", "sparse_attention"]

_OPS = frozenset({"paged_sparse_attention", "sparse_attention"})


def __getattr__(name: str) -> Any:
    if name in _OPS:
        from vllm_sparse_backend import ops

        return getattr(ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
