"""What sampled rows of a call come to exactly, and how far an output and its tiles are from it."""

from __future__ import annotations

import torch
from inputs import Layer
from pydantic import BaseModel

from vllm_sparse_backend.compare import truth
from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE, TileList, causal_tiles, q_blocks

BLOCKS = 6  # q blocks sampled of a call, all of their rows
ORACLE_MASS = 0.98


class Error(BaseModel):
    """Of sampled rows, all heads, against exact dense attention in fp32."""

    relative_l1: float  # sum |O - O~| / sum |O|
    worst_rows: float  # mean relative L1 of the worst 1% of rows
    recall: float  # mean share of a row's softmax mass in its tiles
    worst_recall: float  # mean of the lowest 1%
    needles: int | None = None  # whose tile is computed for their row; None: there are none
    needles_of: int | None = None


class Truth:
    """Exact outputs and softmax masses of some q blocks of a call."""

    def __init__(self, layer: Layer) -> None:
        blocks = q_blocks(len(layer.q), len(layer.k))
        count = min(BLOCKS, -(-len(layer.q) // Q_BLOCK))
        chosen = torch.linspace(0, len(blocks) - 1, count).round().long().unique().tolist()
        self.layer = layer
        self._truth = truth.Truth(layer, [blocks[n] for n in chosen])

    def weights(self, head: int, first: int, end: int) -> torch.Tensor:
        """Softmax weights of the rows at positions ``first`` to ``end``, fp32 [rows, end]."""
        return self._truth.weights(head, first, end)

    def judge(self, out: torch.Tensor, tiles: TileList | None) -> Error:
        """``out`` [T, Hq, D] of the call; ``tiles``: what it computed, None for everything."""
        subtiles = None if tiles is None else _subtiles(tiles)
        its = truth.figures([self._truth.judge(out, subtiles)])
        found = _needles(self.layer, tiles)
        return Error(
            relative_l1=its.error,
            worst_rows=its.tail,
            recall=its.recall,
            worst_recall=its.worst_recall,
            needles=found[0] if found else None,
            needles_of=found[1] if found else None,
        )

    def oracle_density(self, tile: int) -> float:
        """The fewest tiles that hold 98% of a q block's mass, of its causal ones, mean of all."""
        return self._truth.oracle_density(tile, ORACLE_MASS)


def _subtiles(tiles: TileList) -> torch.Tensor:
    """bool [heads, q blocks, subtiles of 16 keys]."""
    width = causal_tiles(tiles.seq_len, SUBTILE)
    sizes = enumerate(tiles.tile_sizes)
    kept = (tiles.mask(head).repeat_interleave(size // SUBTILE, 1) for head, size in sizes)
    return torch.stack([mask[:, :width] for mask in kept])


def _needles(layer: Layer, tiles: TileList | None) -> tuple[int, int] | None:
    if layer.needles is None or not len(layer.needles):
        return None
    if tiles is None:
        return len(layer.needles), len(layer.needles)
    first = layer.offset // Q_BLOCK
    found = 0
    for row, head, key in layer.needles.tolist():
        block = (row + layer.offset) // Q_BLOCK - first
        found += key // tiles.tile_sizes[head] in tiles.row(head, block).tolist()
    return found, len(layer.needles)
