"""The attentions that are compared: ours under a policy, vLLM's own, torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from inputs import Layer

from vllm_sparse_backend.compare import ours
from vllm_sparse_backend.compat_attention import PAGE, CpuAttention
from vllm_sparse_backend.ops import AttentionStats, layout
from vllm_sparse_backend.ops.policies import Place, PolicyTable
from vllm_sparse_backend.selection import AnyPolicy

KV_LAYOUTS = {"cpu": "vec", "triton": "strided"}
GPU_PAGE = 16  # tokens a block of the cache, as vLLM has it on GPUs

Run = Callable[[], torch.Tensor]


class Ours(ours.Ours):
    """The op over a paged cache, as the backend calls it."""

    def __init__(
        self, layer: Layer, policies: list[AnyPolicy], cache: torch.Tensor, impl: str
    ) -> None:
        place = Place(layer.number, 0, len(policies))
        super().__init__(layer, PolicyTable(policies, place=place), cache, KV_LAYOUTS[impl], impl)

    def account(self) -> None:
        """Let `stats` have the phases and tiles of another run, unless runs say so themselves."""


class Planned(Ours):
    """The kernels as a layer of the GPU backend launches them: a step's work was planned before its
    first layer, and nothing is read back."""

    def __init__(self, layer: Layer, policies: list[AnyPolicy], cache: torch.Tensor) -> None:
        from vllm_sparse_backend.ops.triton import plan_work

        super().__init__(layer, policies, cache, "triton")
        rows, keys = len(layer.q), len(layer.k)
        step = np.array([0, rows]), np.array([keys]), [0], layer.q.device
        self._work = plan_work(*step, np.array([self._prompt]))

    def __call__(self) -> torch.Tensor:
        """Launch it once more."""
        self._launch()
        return self._out

    def account(self) -> None:
        """One more run, with marks between the phases."""
        from vllm_sparse_backend.ops.triton import Clock

        clock = Clock(self._out.device)
        tiles, seconds = self._launch(clock), clock.seconds()
        took = [seconds.get(phase, 0.0) for phase in ("pack", "select", "attend")]
        self.stats.append(AttentionStats(tiles.tolist(), self._work.causal(self._table), *took))

    def _launch(self, clock: Any = None) -> torch.Tensor:
        from vllm_sparse_backend.ops.triton import forward

        q, cache, block_table, *_ = self._tensors
        of_layer = self._table, self._step.softmax_scale, self._out
        return forward(q, cache, block_table, self._work, *of_layer, clock)


def ours_of(layer: Layer, policies: list[AnyPolicy], cache: torch.Tensor, impl: str) -> Ours:
    """The op as ``impl``'s backend calls it."""
    planned = impl == "triton"
    return Planned(layer, policies, cache) if planned else Ours(layer, policies, cache, impl)


def pack(layer: Layer, impl: str) -> torch.Tensor:
    """Keys and values as a cache for `Ours`, as vLLM has it where ``impl`` runs."""
    cpu = impl == "cpu"
    cache = layout.pack(layer.k, layer.v, KV_LAYOUTS[impl], PAGE if cpu else GPU_PAGE)
    # On GPUs a token's heads lie side by side.
    return cache if cpu else cache.transpose(1, 2).contiguous().transpose(1, 2)


def cpu_attn(layer: Layer) -> Run:
    """vLLM's own kernel, with the layout it chooses; its plan is made anew for every call, as in
    every step of a server."""
    attention, out = CpuAttention(layer.k, layer.v), torch.empty_like(layer.q)

    def run() -> torch.Tensor:
        attention(layer.q, len(layer.k), layer.softmax_scale, out)
        return out

    return run


@dataclass(frozen=True)
class _Paged:
    """One request's step as vLLM's GPU backends have it: keys and values of a block of the cache,
    each [blocks, N, Hkv, D], and what is planned once for all layers."""

    keys: torch.Tensor
    values: torch.Tensor
    pages: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, layer: Layer) -> _Paged:
        """Of a layer."""

        def numbers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=layer.q.device)

        keys, values = pack(layer, "triton").transpose(1, 2).split(layer.k.shape[2], -1)
        pages = torch.arange(len(keys), dtype=torch.int32, device=layer.q.device)[None]
        return cls(keys, values, pages, numbers(0, len(layer.q)), numbers(len(layer.k)))


def flash_attn(layer: Layer) -> Run:
    """vLLM's FlashAttention as FLASH_ATTN calls it, with the schedule that version 3 has made once
    for all layers of a step."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        get_scheduler_metadata,
    )

    its, q, dim = _Paged.of(layer), layer.q, layer.q.shape[2]
    out, version = torch.empty_like(q), get_flash_attn_version(head_size=dim)
    schedule = None
    if version == 3:
        schedule = get_scheduler_metadata(
            batch_size=1, max_seqlen_q=len(q), max_seqlen_k=len(layer.k), num_heads_q=q.shape[1],
            num_heads_kv=layer.k.shape[1], headdim=dim, cache_seqlens=its.lengths,
            qkv_dtype=q.dtype, cu_seqlens_q=its.starts, page_size=GPU_PAGE, causal=True,
        )  # fmt: skip

    def run() -> torch.Tensor:
        flash_attn_varlen_func(
            q=q, k=its.keys, v=its.values, out=out, cu_seqlens_q=its.starts, max_seqlen_q=len(q),
            seqused_k=its.lengths, max_seqlen_k=len(layer.k), softmax_scale=layer.softmax_scale,
            causal=True, block_table=its.pages, scheduler_metadata=schedule, fa_version=version,
        )  # fmt: skip
        return out

    return run


def triton_attn(layer: Layer) -> Run:
    """vLLM's own Triton kernel, as TRITON_ATTN calls it for prompts."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    its, q = _Paged.of(layer), layer.q
    out = torch.empty_like(q)

    def run() -> torch.Tensor:
        unified_attention(
            q=q, k=its.keys, v=its.values, out=out, cu_seqlens_q=its.starts, max_seqlen_q=len(q),
            seqused_k=its.lengths, max_seqlen_k=len(layer.k), softmax_scale=layer.softmax_scale,
            causal=True, window_size=(-1, -1), block_table=its.pages, softcap=0,
            q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip
        return out

    return run


def sdpa(layer: Layer) -> Run:
    """torch's attention of a whole prompt. K and V are repeated for GQA beforehand: what is timed
    is the kernel. Raises ValueError for a part of a prompt, for which it would need a mask."""
    if len(layer.q) != len(layer.k):
        raise ValueError(f"sdpa: want as many rows as keys, got {len(layer.q)}, {len(layer.k)}")
    group = layer.q.shape[1] // layer.k.shape[1]
    q, k, v = (
        x.transpose(0, 1)[None].contiguous()
        for x in (layer.q, *(x.repeat_interleave(group, 1) for x in (layer.k, layer.v)))
    )

    def run() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out[0].transpose(0, 1)

    return run
