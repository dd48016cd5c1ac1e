"""The op in plain torch, one request at a time: the truth the kernels are held to.

Nothing here is meant to be fast, and scores are kept whole: [T, S] fp32 per head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse_backend.ops import listed
from vllm_sparse_backend.ops.policies import DENSE_TILE, Place, tile_size
from vllm_sparse_backend.ops.tiles import Q_BLOCK, TileList, causal_tiles, q_blocks
from vllm_sparse_backend.selection import (
    AnyPolicy,
    ListSelector,
    Mass,
    Sale,
    Static,
    mass,
    sale,
    static,
)


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    policies: Sequence[AnyPolicy],
    scale: float,
    prompt_len: int | None = None,
    mean_of: int | None = None,
    v: torch.Tensor | None = None,
    place: Place | None = None,
) -> TileList:
    """The tiles each head computes. ``q`` [T, Hq, D] are the last T positions of ``k`` [S, Hkv, D].

    One policy per q head; q head h reads kv head ``h // (Hq // Hkv)``. ``prompt_len``: of the
    prompt of which this may be a chunk, S unless given. ``mean_of``: the first keys about whose
    mean keys are quantized, S unless given. ``v`` [S, Hkv, D] and ``place`` are for list selectors
    that look at them.
    """
    blocks = q_blocks(q.shape[0], k.shape[0])
    group = q.shape[1] // k.shape[1]
    how = scale, blocks, prompt_len, mean_of

    def read(kv_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        if v is None:
            raise ValueError(
                "v: want [S, Hkv, D] for a list selector that looks at K or V, got None"
            )
        return k[:, kv_head], v[:, kv_head]

    place = place or Place(None, 0, q.shape[1])
    prompt = k.shape[0] if prompt_len is None else prompt_len
    lists = dict(
        listed.kept_by_head(q, policies, place, scale, k.shape[0], prompt, k.shape[1], read)
    )
    keep = []
    for head, policy in enumerate(policies):
        if isinstance(policy, ListSelector):
            counts = [causal_tiles(b.end, policy.tile) for b in blocks]
            keep.append([row[:count] for row, count in zip(lists[head], counts, strict=True)])
        elif isinstance(policy, Sale):
            keep.append(sale.keep(policy, q[:, head], k[:, head // group], *how))
        elif isinstance(policy, Mass):
            keep.append(mass.keep(policy, q[:, head], k[:, head // group], *how))
        elif isinstance(policy, Static):
            keep.append(static.keep(policy, blocks))
        else:
            keep.append(
                [torch.ones(causal_tiles(b.end, DENSE_TILE), dtype=torch.bool) for b in blocks]
            )
    sizes = [tile_size(policy) for policy in policies]
    return TileList.from_keep(keep, sizes, q.shape[0], k.shape[0])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: TileList, scale: float
) -> torch.Tensor:
    """Softmax attention over the causal keys of the kept tiles, in fp32; [T, Hq, D] of q's dtype.

    ``q`` [T, Hq, D] are the last T positions of ``k``, ``v`` [S, Hkv, D].
    """
    group = q.shape[1] // k.shape[1]
    position = torch.arange(k.shape[0] - q.shape[0], k.shape[0])  # [T]
    row_block = position // Q_BLOCK - position[:1] // Q_BLOCK
    causal = torch.arange(k.shape[0]) <= position[:, None]  # [T, S]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for head in range(q.shape[1]):
        kept = tiles.mask(head).repeat_interleave(tiles.tile_sizes[head], 1)[:, : k.shape[0]]
        s = scale * (q[:, head].float() @ k[:, head // group].float().T)  # [T, S]
        s = s.masked_fill(~(kept[row_block] & causal), -torch.inf)
        out[:, head] = (s.softmax(-1) @ v[:, head // group].float()).to(q.dtype)
    return out
