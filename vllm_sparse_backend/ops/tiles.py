"""Q blocks and tiles: their geometry, and which of them a selection keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_sparse_backend.selection.blocks import QBlock as QBlock
from vllm_sparse_backend.selection.blocks import causal_tiles as causal_tiles
from vllm_sparse_backend.selection.blocks import q_blocks as q_blocks
from vllm_sparse_backend.selection.policy import Q_BLOCK as Q_BLOCK

SUBTILE = 16  # keys per element of a kernel's tile map; every tile size is a multiple


@lru_cache(256)  # every layer of a step asks the same
def total_causal_tiles(query_len: int, seq_len: int, tile: int) -> int:
    """`causal_tiles` of all q blocks of the last ``query_len`` of ``seq_len`` positions."""
    return sum(causal_tiles(block.end, tile) for block in q_blocks(query_len, seq_len))


@dataclass(frozen=True, eq=False)
class TileList:
    """The tiles one request computes: CSR over (q head, q block), heads outermost.

    Row ``head * num_blocks + block`` holds ``tiles[indptr[row]:indptr[row + 1]]``, ascending
    and unique; tile j of a head covers the keys ``[j * tile, (j + 1) * tile)`` with that
    head's tile size, cut off by causality. Blocks count from the first present one.
    """

    indptr: torch.Tensor  # int64 [num_heads * num_blocks + 1]
    tiles: torch.Tensor  # int32 [number of kept tiles]
    tile_sizes: tuple[int, ...]  # one per q head
    query_len: int
    seq_len: int

    @property
    def blocks(self) -> list[QBlock]:
        """The q blocks, in the order of the rows of one head."""
        return q_blocks(self.query_len, self.seq_len)

    @classmethod
    def from_keep(
        cls,
        keep: Sequence[Sequence[torch.Tensor]],
        tile_sizes: Sequence[int],
        query_len: int,
        seq_len: int,
    ) -> TileList:
        """From ``keep[head][block]``, bool [causal tiles of the block]. Raises ValueError."""
        rows = [row.nonzero().flatten() for head in keep for row in head]
        counts = torch.tensor([0] + [len(row) for row in rows])
        tiles = torch.cat(rows) if rows else counts[:0]
        made = cls(counts.cumsum(0), tiles.int(), tuple(tile_sizes), query_len, seq_len)
        made.validate()
        return made

    @classmethod
    def from_subtiles(
        cls, subtiles: torch.Tensor, tile_sizes: Sequence[int], query_len: int, seq_len: int
    ) -> TileList:
        """From a kernel's map of the 16-key subtiles it computed.

        ``subtiles`` is [num_heads, num_blocks, ceil(seq_len / 16)], non-zero where computed.
        Raises ValueError if the causal part of a tile was computed in part only, or anything
        behind it at all.
        """
        blocks = q_blocks(query_len, seq_len)
        want = (len(tile_sizes), len(blocks), causal_tiles(seq_len, SUBTILE))
        if subtiles.shape != want:
            raise ValueError(f"subtiles: want {list(want)}, got {list(subtiles.shape)}")
        keep: list[list[torch.Tensor]] = []
        for head, tile in enumerate(tile_sizes):
            keep.append([])
            for row, block in zip(subtiles[head] != 0, blocks, strict=True):
                count = causal_tiles(block.end, SUBTILE)
                kept = row[:: tile // SUBTILE][: causal_tiles(block.end, tile)]
                whole = kept.repeat_interleave(tile // SUBTILE)[:count]
                if row[count:].any() or (row[:count] != whole).any():
                    raise ValueError(f"subtiles: head {head}, {block}: not whole tiles of {tile}")
                keep[-1].append(kept)
        return cls.from_keep(keep, tile_sizes, query_len, seq_len)

    def validate(self) -> None:
        """Raise ValueError, naming the row, if this is not a TileList as described above."""
        num_rows = len(self.tile_sizes) * len(self.blocks)
        _want("indptr", self.indptr, torch.int64, num_rows + 1)
        _want("tiles", self.tiles, torch.int32, int(self.indptr[-1]))
        if self.indptr[0] != 0 or (self.indptr.diff() < 0).any():
            raise ValueError(f"indptr: want it to ascend from 0, got {self.indptr.tolist()}")
        for head, tile in enumerate(self.tile_sizes):
            for block, edges in enumerate(self.blocks):
                row = self.row(head, block)
                count = causal_tiles(edges.end, tile)
                if (row.diff() <= 0).any() or (row < 0).any() or (row >= count).any():
                    raise ValueError(
                        f"tiles of head {head}, q block {block}: want ascending unique "
                        f"numbers below {count}, got {row.tolist()}"
                    )

    def row(self, head: int, block: int) -> torch.Tensor:
        """The tiles of one head and q block, int32, ascending."""
        at = head * len(self.blocks) + block
        return self.tiles[int(self.indptr[at]) : int(self.indptr[at + 1])]

    def mask(self, head: int) -> torch.Tensor:
        """One head's tiles as bool [num_blocks, ceil(seq_len / tile)]."""
        width = causal_tiles(self.seq_len, self.tile_sizes[head])
        mask = torch.zeros(len(self.blocks), width, dtype=torch.bool)
        for block in range(len(self.blocks)):
            mask[block, self.row(head, block).long()] = True
        return mask

    @property
    def computed(self) -> list[int]:
        """Kept tiles per q head, summed over q blocks."""
        rows: list[int] = self.indptr.diff().tolist()
        width = len(self.blocks)
        return [sum(rows[head * width :][:width]) for head in range(len(self.tile_sizes))]

    @property
    def causal(self) -> list[int]:
        """Causal tiles per q head, summed over q blocks."""
        return [sum(causal_tiles(b.end, tile) for b in self.blocks) for tile in self.tile_sizes]


def _want(name: str, tensor: torch.Tensor, dtype: torch.dtype, length: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (length,):
        raise ValueError(
            f"{name}: want [{length}] {dtype}, got {list(tensor.shape)} {tensor.dtype}"
        )
