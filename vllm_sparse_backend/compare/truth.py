"""What sampled rows of a step come to exactly, and how far an output and its tiles are from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.compare.layer import Layer
from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE, QBlock

WORST = 0.01  # share of the rows


class Judged(NamedTuple):
    """Of the sampled rows of all heads, in no order that matters: fp32 [N] each."""

    missed: torch.Tensor  # sum over channels of |O~ - O|
    size: torch.Tensor  # sum over channels of |O|
    mass: torch.Tensor  # softmax mass of the tiles that are computed


class Figures(NamedTuple):
    """Of many rows, against exact dense attention."""

    error: float  # relative L1: sum of |O~ - O| over sum of |O|
    tail: float  # mean relative L1 of the worst 1% of the rows
    recall: float  # mean share of a row's softmax mass in its tiles
    worst_recall: float  # mean of the lowest 1%


class _Block(NamedTuple):
    number: int  # among the q blocks of the step
    rows: slice  # of the step's q
    exact: torch.Tensor  # fp32 [R, Hq, D]
    mass: torch.Tensor  # fp32 [Hq, R, subtiles]: softmax mass of every 16 keys


class Truth:
    """Exact outputs and softmax masses of some q blocks of a step.

    Memory: 4 bytes for every sampled row, head and 16 keys, and one head's softmax weights.
    """

    def __init__(self, layer: Layer, blocks: Sequence[QBlock]) -> None:
        self.layer, self.blocks = layer, list(blocks)

    def weights(self, head: int, first: int, end: int) -> torch.Tensor:
        """Softmax weights of the rows at positions ``first`` to ``end``, fp32 [rows, end]."""
        layer = self.layer
        q = layer.q[first - layer.offset : end - layer.offset, head].float()
        s = q @ layer.k[:end, head // layer.group].float().T * layer.softmax_scale
        later = torch.arange(end) > torch.arange(first, end)[:, None]
        return s.masked_fill_(later, -torch.inf).softmax(-1)

    @cached_property
    def _known(self) -> list[_Block]:
        return [self._of(block) for block in self.blocks]

    def _of(self, block: QBlock) -> _Block:
        layer, (start, first, end) = self.layer, block
        exact, mass = [], []
        for head in range(layer.q.shape[1]):
            p = self.weights(head, first, end)
            exact.append(p @ layer.v[:end, head // layer.group].float())
            mass.append(pad(p, (0, -end % SUBTILE)).unflatten(1, (-1, SUBTILE)).sum(2))
        rows = slice(first - layer.offset, end - layer.offset)
        number = start // Q_BLOCK - layer.offset // Q_BLOCK
        return _Block(number, rows, torch.stack(exact, 1), torch.stack(mass))

    def judge(self, out: torch.Tensor, subtiles: torch.Tensor | None) -> Judged:
        """``out`` [T, Hq, D] of the step; ``subtiles`` [Hq, q blocks, subtiles of 16 keys]: not 0
        where it was computed; None for everything."""
        missed, size, mass = [], [], []
        for block in self._known:
            missed.append((out[block.rows].float() - block.exact).abs().sum(2).flatten())
            size.append(block.exact.abs().sum(2).flatten())
            if subtiles is None:
                mass.append(torch.ones(block.exact.shape[:2]).flatten())
            else:
                kept = subtiles[:, block.number, : block.mass.shape[2]] != 0  # [Hq, subtiles]
                mass.append(torch.einsum("hrt,ht->rh", block.mass, kept.float()).flatten())
        return Judged(torch.cat(missed), torch.cat(size), torch.cat(mass))

    def oracle_density(self, tile: int, mass: float) -> float:
        """The fewest tiles that hold that share of a q block's softmax mass, of its causal ones:
        the mean over blocks and heads."""
        shares = []
        for block in self._known:
            by_subtile = block.mass.mean(1)  # [Hq, subtiles]
            per = tile // SUBTILE
            tiles = pad(by_subtile, (0, -by_subtile.shape[1] % per)).unflatten(1, (-1, per)).sum(2)
            run = tiles.sort(descending=True).values.cumsum(1)
            shares += (((run < mass).sum(1) + 1) / tiles.shape[1]).tolist()
        return sum(shares) / len(shares)


def figures(judged: Sequence[Judged]) -> Figures:
    """Of all rows together."""
    missed, size, mass = (torch.cat(parts).double() for parts in zip(*judged, strict=True))
    relative = missed / size.clamp(min=1e-30)
    return Figures(
        error=float(missed.sum() / size.sum().clamp(min=1e-30)),
        tail=_worst(relative.sort(descending=True).values),
        recall=float(mass.mean()),
        worst_recall=_worst(mass.sort().values),
    )


def _worst(ordered: torch.Tensor) -> float:
    return float(ordered[: max(1, round(WORST * len(ordered)))].mean())
