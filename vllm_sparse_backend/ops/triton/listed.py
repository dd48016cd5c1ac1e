"""What list selectors choose, in torch on the tensors' device, as the bits that `compact` reads.

A selector may wait for the device; nothing here does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.ops.listed import kept_by_head, kept_of_paged
from vllm_sparse_backend.ops.policies import PolicyTable, tile_size
from vllm_sparse_backend.ops.tiles import SUBTILE
from vllm_sparse_backend.ops.triton.launch import WORD_KEYS
from vllm_sparse_backend.ops.triton.work import Work

WORD_BYTES: Final = 4  # of 8 subtiles each, the first in the lowest bits


def set_bits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: Work,
    table: PolicyTable,
    scale: float,
    mask: torch.Tensor,
) -> None:
    """Have the layer's list selectors choose for each request, where they are followed at its
    length, and write what they keep over their heads' rows of ``mask``.

    int32 ``mask`` [B, Hq, words] has in bit j of word w whether subtile 32 w + j is computed. The
    others as in `run.forward`; memory as of `kept_of_paged`. Raises what selectors raise.
    """
    for share in work.shares():
        if not table.listed(share.context):
            continue
        paged = q[share.rows], kv_cache, block_table[share.request], table, scale
        for head, kept in kept_of_paged(*paged, share.context, share.prompt, "strided"):
            size = table.tile_sizes[head] // SUBTILE
            mask[share.blocks, head] = as_bits(kept, size, mask.shape[2])


def choose_of_zeros(
    q: torch.Tensor, num_kv_heads: int, keys: int, table: PolicyTable, scale: float
) -> None:
    """Have list selectors choose for zeros in the place of ``q`` [T, Hq, D] and of ``keys`` keys:
    so that the memory it takes beside them is taken once while somebody measures.

    Once for kv heads whose heads have the same policies. Raises what selectors raise.
    """
    num_heads, dim = q.shape[1:]
    group = num_heads // num_kv_heads
    zeros = q.new_zeros(()).expand_as(q)

    def read(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = q.new_zeros(keys, 2 * dim).split(dim, 1)  # as they come out of the cache
        return k, v

    seen = set()
    for first in range(0, num_heads, group):
        policies = tuple(table.rows[first : first + group])
        if policies in seen:
            continue
        seen.add(policies)
        place = replace(table.place, first_head=table.place.first_head + first)
        own = zeros[:, first : first + group]
        for head, kept in kept_by_head(own, policies, place, scale, keys, keys, 1, read):
            as_bits(kept, tile_size(policies[head]) // SUBTILE, -(-keys // WORD_KEYS))


def as_bits(kept: torch.Tensor, size: int, words: int) -> torch.Tensor:
    """Tiles of ``size`` subtiles each, bool [blocks, tiles], as bits of subtiles, int32
    [blocks, words]. A word holds whole tiles."""
    subtiles = kept.repeat_interleave(size, 1)
    missing = words * WORD_BYTES * 8 - subtiles.shape[1]
    by_byte = pad(subtiles, (0, missing)).unflatten(1, (words * WORD_BYTES, 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (by_byte * weights).sum(2, dtype=torch.uint8).view(torch.int32)
