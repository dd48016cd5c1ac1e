"""vLLM's own attention kernel on CPUs, called by itself: what dense attention takes.

Follows vLLM 0.32's cpu_attn.py.
"""

from __future__ import annotations

from importlib import import_module

import torch

PAGE = 128  # tokens a block of the cache, as vLLM's CPU platform has it
_OPS = ("cpu_attn_reshape_and_cache", "get_scheduler_metadata", "cpu_attention_with_kv_cache")


def why_no_cpu_attention() -> str | None:
    """Why `CpuAttention` cannot be had in this process; None: it can."""
    try:
        import_module("vllm._custom_ops")
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    missing = [name for name in _OPS if not hasattr(torch.ops._C, name)]
    return f"this vLLM has no {missing[0]}: it is no CPU build" if missing else None


class CpuAttention:
    """CPU_ATTN over a paged cache that holds one sequence's ``k``, ``v`` [S, Hkv, D].

    ``kv_cache`` [blocks, Hkv, PAGE, 2 * D] is in the layout that vLLM chooses here, ``kv_layout``,
    position p in block p // PAGE: our own core reads the same.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        length, self._kv_heads, dim = k.shape
        blocks = -(-length // PAGE)
        self.kv_layout: str = _get_attn_isa(k.dtype, PAGE, dim)
        self.kv_cache = k.new_zeros(blocks, self._kv_heads, PAGE, 2 * dim)
        regions = self.kv_cache.view(blocks, self._kv_heads, 2 * PAGE, dim)
        self._keys, self._values = regions.chunk(2, dim=2)
        slots = torch.arange(length)
        ops.cpu_attn_reshape_and_cache(k, v, self._keys, self._values, slots, self.kv_layout)
        self._pages = torch.arange(blocks, dtype=torch.int32)[None]

    def __call__(self, q: torch.Tensor, seq_len: int, scale: float, out: torch.Tensor) -> None:
        """Causal attention of ``q`` [T, Hq, D], the last T of the first ``seq_len`` positions,
        into ``out``. The plan is made anew for every call, as in every step of a server."""
        from vllm import _custom_ops as ops

        rows, heads, dim = q.shape
        starts = torch.tensor([0, rows], dtype=torch.int32)
        lengths = torch.tensor([seq_len], dtype=torch.int32)
        plan = ops.cpu_attn_get_scheduler_metadata(
            1, heads, self._kv_heads, dim, lengths, q.dtype, starts, True, -1, self.kv_layout, True
        )
        ops.cpu_attention_with_kv_cache(
            q, self._keys, self._values, out, starts, lengths, scale, True, None, -1, self._pages,
            0.0, plan, None,
        )  # fmt: skip
