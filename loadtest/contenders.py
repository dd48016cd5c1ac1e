"""The attentions that are compared: ours under a policy, vLLM's own, torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from inputs import Layer

from vllm_sparse_backend.compare import ours
from vllm_sparse_backend.compat_attention import PAGE, CpuAttention
from vllm_sparse_backend.ops import layout
from vllm_sparse_backend.ops.policies import Place, PolicyTable
from vllm_sparse_backend.selection import AnyPolicy

KV_LAYOUTS = {"cpu": "vec", "triton": "strided"}

Run = Callable[[], torch.Tensor]


class Ours(ours.Ours):
    """The op over a paged cache, as the backend calls it."""

    def __init__(
        self, layer: Layer, policies: list[AnyPolicy], cache: torch.Tensor, impl: str
    ) -> None:
        place = Place(layer.number, 0, len(policies))
        super().__init__(layer, PolicyTable(policies, place=place), cache, KV_LAYOUTS[impl], impl)


def pack(layer: Layer, impl: str) -> torch.Tensor:
    """Keys and values as a cache for `Ours`."""
    return layout.pack(layer.k, layer.v, KV_LAYOUTS[impl], PAGE)


def cpu_attn(layer: Layer) -> Run:
    """vLLM's own kernel, with the layout it chooses; its plan is made anew for every call, as in
    every step of a server."""
    attention, out = CpuAttention(layer.k, layer.v), torch.empty_like(layer.q)

    def run() -> torch.Tensor:
        attention(layer.q, len(layer.k), layer.softmax_scale, out)
        return out

    return run


def flash_attn(layer: Layer) -> Run:
    """vLLM's FlashAttention over a paged cache in the layout it prefers, keys of all heads of a
    token side by side."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    q, (length, kv_heads, dim) = layer.q, layer.k.shape
    blocks = -(-length // PAGE)
    keys, values = (x.new_zeros(blocks, PAGE, kv_heads, dim) for x in (layer.k, layer.v))
    for cache, plain in ((keys, layer.k), (values, layer.v)):
        cache.flatten(0, 1)[:length] = plain
    pages = torch.arange(blocks, dtype=torch.int32, device=q.device)[None]
    starts = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    lengths = torch.tensor([length], dtype=torch.int32, device=q.device)
    out, version = torch.empty_like(q), get_flash_attn_version(head_size=dim)

    def run() -> torch.Tensor:
        flash_attn_varlen_func(
            q=q, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=len(q),
            seqused_k=lengths, max_seqlen_k=length, softmax_scale=dim**-0.5, causal=True,
            block_table=pages, fa_version=version,
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
