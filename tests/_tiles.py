"""Two tile lists are one, but for ties: the explanation of every difference between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from _attention import QKV, tie_width

from vllm_sparse_backend.ops import TileList
from vllm_sparse_backend.selection import AnyPolicy, Mass, Sale, mass, sale


def assert_same_tiles(
    own: TileList,
    other: TileList,
    qkv: QKV,
    policies: Sequence[AnyPolicy],
    scale: float,
    prompt_len: int | None = None,
    mean_of: int | None = None,
) -> int:
    """Tiles that differ were chosen within rounding of the threshold. Their number."""
    q, k, _ = qkv
    assert own.tile_sizes == other.tile_sizes
    assert own.blocks == other.blocks
    ties = 0
    for head, policy in enumerate(policies):
        differs = own.mask(head) != other.mask(head)
        if not differs.any():
            continue
        assert isinstance(policy, Sale | Mass), f"head {head}: {policy} leaves nothing to rounding"
        query, keys = q[:, head], k[:, head // (q.shape[1] // k.shape[1])]
        if isinstance(policy, Sale):
            margins = sale.margins(policy, query, keys, scale, own.blocks, prompt_len, mean_of)
        else:
            margins = mass.margins(policy, query, keys, scale, own.blocks, prompt_len, mean_of)
        width = tie_width(query, keys, scale)
        for block, tile in differs.nonzero().tolist():
            margin = float(margins[block][tile])
            assert abs(margin) <= width, (
                f"head {head}, q block {block}, tile {tile}: "
                f"margin {margin:.3g}, a tie is {width:.3g}"
            )
        ties += int(differs.sum())
    return ties


def recall(qkv: QKV, tiles: TileList, head: int, scale: float) -> torch.Tensor:
    """[T]: the share of each query's softmax mass that lies in the kept tiles of its q block."""
    q, k, _ = qkv
    position = torch.arange(tiles.seq_len - tiles.query_len, tiles.seq_len)
    s = scale * (q[:, head].float() @ k[:, head // (q.shape[1] // k.shape[1])].float().T)
    p = s.masked_fill(torch.arange(tiles.seq_len) > position[:, None], -torch.inf).softmax(-1)
    kept = tiles.mask(head).repeat_interleave(tiles.tile_sizes[head], 1)[:, : tiles.seq_len]
    return (p * kept[position // 64 - position[0] // 64]).sum(1)
