"""What sampled rows of a call come to exactly, and how far an output and its tiles are from it."""

from __future__ import annotations

import torch
from inputs import Layer
from pydantic import BaseModel

from vllm_sparse_backend.ops.tiles import Q_BLOCK, TileList

BLOCKS = 6  # q blocks sampled of a call, all of their rows
ORACLE_MASS = 0.98
WORST = 0.01  # share of the rows


class Error(BaseModel):
    """Of sampled rows, all heads, against exact dense attention in fp32."""

    relative_l1: float  # sum |O - O~| / sum |O|
    worst_rows: float  # mean relative L1 of the worst 1% of rows
    recall: float  # mean share of a row's softmax mass in its tiles
    worst_recall: float  # mean of the lowest 1%
    needles: int | None = None  # whose tile is computed for their row; None: there are none
    needles_of: int | None = None


class Truth:
    """Exact outputs and softmax weights of some q blocks of a call, one at a time in memory."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        rows, offset = len(layer.q), len(layer.k) - len(layer.q)
        count = min(BLOCKS, -(-rows // Q_BLOCK))
        last = (len(layer.k) - 1) // Q_BLOCK
        first = offset // Q_BLOCK
        blocks = torch.linspace(first, last, count).round().long().unique().tolist()
        self.blocks = [
            (b - first, max(b * Q_BLOCK, offset), min((b + 1) * Q_BLOCK, len(layer.k)))
            for b in blocks
        ]
        self.offset = offset

    def weights(self, head: int, first: int, end: int) -> torch.Tensor:
        """Softmax weights of the rows at positions ``first`` to ``end``, fp32 [rows, end]."""
        layer = self.layer
        group = layer.q.shape[1] // layer.k.shape[1]
        q = layer.q[first - self.offset : end - self.offset, head].float()
        s = q @ layer.k[:end, head // group].float().T * layer.q.shape[2] ** -0.5
        causal = torch.arange(end) <= torch.arange(first, end)[:, None]
        return s.masked_fill(~causal, -torch.inf).softmax(-1)

    def judge(self, out: torch.Tensor, tiles: TileList | None) -> Error:
        """``out`` [T, Hq, D] of the call; ``tiles``: what it computed, None for everything."""
        layer = self.layer
        group = layer.q.shape[1] // layer.k.shape[1]
        missed, size, recall = [], [], []
        for block, first, end in self.blocks:
            for head in range(layer.q.shape[1]):
                p = self.weights(head, first, end)
                want = p @ layer.v[:end, head // group].float()
                got = out[first - self.offset : end - self.offset, head].float()
                missed.append((got - want).abs().sum(1))
                size.append(want.abs().sum(1))
                if tiles is not None:
                    recall.append(self._mass(p, tiles, head, block))
        error, whole = torch.cat(missed), torch.cat(size)
        mass = torch.cat(recall) if recall else torch.ones(len(error))
        found = _needles(layer, tiles)
        return Error(
            relative_l1=float(error.sum() / whole.sum()),
            worst_rows=_worst((error / whole).sort(descending=True).values),
            recall=float(mass.mean()),
            worst_recall=_worst(mass.sort().values),
            needles=found[0] if found else None,
            needles_of=found[1] if found else None,
        )

    def oracle_density(self, tile: int) -> float:
        """The fewest tiles that hold 98% of a q block's mass, of its causal ones, mean of all."""
        shares = []
        for _, first, end in self.blocks:
            for head in range(self.layer.q.shape[1]):
                p = self.weights(head, first, end).mean(0)
                mass = torch.nn.functional.pad(p, (0, -end % tile)).view(-1, tile).sum(1)
                run = mass.sort(descending=True).values.cumsum(0)
                shares.append((int((run < ORACLE_MASS).sum()) + 1) / len(mass))
        return sum(shares) / len(shares)

    @staticmethod
    def _mass(p: torch.Tensor, tiles: TileList, head: int, block: int) -> torch.Tensor:
        kept = torch.zeros(-(-p.shape[1] // tiles.tile_sizes[head]))
        kept[tiles.row(head, block).long()] = 1
        return (p * kept.repeat_interleave(tiles.tile_sizes[head])[: p.shape[1]]).sum(1)


def _worst(ordered: torch.Tensor) -> float:
    return float(ordered[: max(1, round(WORST * len(ordered)))].mean())


def _needles(layer: Layer, tiles: TileList | None) -> tuple[int, int] | None:
    if layer.needles is None or not len(layer.needles):
        return None
    if tiles is None:
        return len(layer.needles), len(layer.needles)
    first = (len(layer.k) - len(layer.q)) // Q_BLOCK
    found = 0
    for row, head, key in layer.needles.tolist():
        block = (row + len(layer.k) - len(layer.q)) // Q_BLOCK - first
        found += key // tiles.tile_sizes[head] in tiles.row(head, block).tolist()
    return found, len(layer.needles)
