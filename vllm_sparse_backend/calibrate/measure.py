"""What every setting of every ladder does to sampled q blocks, against exact attention.

For a q block of one head: scores, softmax and each tile's share of the output once, in fp32; then,
for each fused ladder, those shares summed by the last setting that keeps the tile, so that the
outputs of all settings are running sums; and for each setting of a list selector, summed over the
tiles that it keeps. That costs little more than dense attention to the block. List selectors choose
for all blocks of a step, as they do when they are served, and are timed.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from vllm_sparse_backend.calibrate.candidates import (
    LADDERS,
    SCORED,
    TILE,
    Ladder,
    levels,
    octave_of,
)
from vllm_sparse_backend.ops.listed import kept_by_head
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.ops.tiles import Q_BLOCK, QBlock, causal_tiles, q_blocks
from vllm_sparse_backend.selection.estimate import Block, estimates, scored_rows

WORST = 0.01  # share of the rows whose error is the tail error
BY_LADDER = ("error", "square", "worst", "worst_size", "mass", "kept")
TILES_AT_ONCE = 1024  # whose shares of the output are held: 17 MB at head_dim 64

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """Of one q block, head and ladder of G settings, R rows."""

    error: torch.Tensor  # [G, R] sum over channels of |O~ - O|
    square: torch.Tensor  # [G] sum over rows and channels of (O~ - O)^2
    mass: torch.Tensor  # [G] share of the softmax mass that is kept, summed over rows
    kept: torch.Tensor  # [G] keys of whole tiles

    def clone(self) -> Outcome:
        """In memory of its own."""
        return Outcome(
            self.error.clone(), self.square.clone(), self.mass.clone(), self.kept.clone()
        )


def sampled(length: int, count: int, seed: str) -> list[int]:
    """Where at most ``count`` q blocks of the first ``length`` tokens of a prompt start, ascending:
    any one from each of as many equal parts, whatever the steps that it is read in.

    The last part gives the last block there is, whole or not: questions stand at the end.
    """
    starts = range(0, length, Q_BLOCK)
    count = min(count, len(starts))
    edges = [i * len(starts) // count for i in range(count + 1)]
    rng = random.Random(seed)
    chosen = [rng.choice(starts[a:b]) for a, b in itertools.pairwise(edges)]
    return [*chosen[:-1], starts[-1]]


def of_step(starts: Collection[int], query_len: int, seq_len: int) -> list[QBlock]:
    """Those of the q blocks that start there which a step has rows of; they may be none."""
    return [block for block in q_blocks(query_len, seq_len) if block.start in starts]


Masks = list[torch.Tensor]  # of one head and q block: by listed ladder, bool [G, causal tiles]


def outcomes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    blocks: Sequence[QBlock],
    masks: Sequence[Masks] | None = None,
    prompt_len: int | None = None,
) -> Iterator[tuple[QBlock, torch.Tensor, list[Outcome]]]:
    """For each q block: itself, the size of its exact output [R], an outcome per fused ladder and
    then for each of the block's ``masks``.

    One head: ``q`` [T, D] are the last T of the positions of ``k``, ``v`` [S, D], all fp32, of a
    prompt of ``prompt_len`` tokens; S unless given.
    """
    offset = len(k) - len(q)
    tiled = _by_tiles(v)
    listed = masks or [[] for _ in blocks]
    scored = estimates(SCORED[1], q, k, scale, blocks, prompt_len)
    for block, every, chosen in zip(blocks, scored, listed, strict=True):
        rows = q[block.first - offset : block.end - offset]
        s = scale * (rows @ k[: block.end].T)  # [R, end]
        position = torch.arange(block.first, block.end)
        s.masked_fill_(torch.arange(block.end) > position[:, None], -torch.inf)
        p = s.softmax(1)
        scores = _by_stride(every, block, prompt_len or len(k))
        kept_by = [levels(its, block, scores[its.row_stride]) for its in LADDERS]  # [tiles] each
        added, sums = _added(p, tiled, kept_by, chosen)
        exact = added[0].sum(0)[:-1]  # [D, R]
        found = [_nested(its, keys, exact) for its, keys in zip(added, kept_by, strict=True)]
        found += [_outcome(its, m.sum(1), exact) for its, m in zip(sums, chosen, strict=True)]
        yield block, exact.abs().sum(0), found


def _by_stride(every: Block, block: QBlock, prompt_len: int) -> dict[int, Block]:
    """The estimates of the rows that are scored at each stride, from those of every row."""
    rows = {
        stride: scored_rows(policy, block.first, block.end, prompt_len) - block.first
        for stride, policy in SCORED.items()
    }
    return {stride: every._replace(excess=every.excess[its]) for stride, its in rows.items()} | {
        0: every
    }


def _by_tiles(v: torch.Tensor) -> torch.Tensor:
    """Values [S, D] as [tiles, D + 1, TILE], with a channel of ones, whose product is the mass."""
    v = pad(v, (0, 1, 0, -len(v) % TILE), value=1.0)
    return v.view(-1, TILE, v.shape[1]).transpose(1, 2).contiguous()


def _added(
    p: torch.Tensor, v: torch.Tensor, kept_by: list[torch.Tensor], masks: Masks
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the tiles that the first n settings keep, and no more, add to the output: by ladder,
    [settings + 1, D + 1, R], where the last channel is their mass; and what those of ``masks`` do:
    [settings, D + 1, R]. ``p`` [R, end]; ``v`` by tiles.
    """
    tiles, rows = len(kept_by[0]), len(p)
    p = pad(p, (0, TILE * tiles - p.shape[1])).T.reshape(tiles, TILE, rows)
    made = [torch.zeros(len(its.settings) + 1, v.shape[1], rows) for its in LADDERS]
    sums = [torch.zeros(len(mask), v.shape[1], rows) for mask in masks]
    for some in range(0, tiles, TILES_AT_ONCE):
        these = slice(some, min(some + TILES_AT_ONCE, tiles))
        part = v[these] @ p[these]  # [tiles, D + 1, R]
        for of_ladder, keys in zip(made, kept_by, strict=True):
            of_ladder.index_add_(0, keys[these], part)
        for of_ladder, mask in zip(sums, masks, strict=True):
            of_ladder.add_(torch.tensordot(mask[:, these].float(), part, 1))
    return made, sums


def _nested(added: torch.Tensor, kept_by: torch.Tensor, exact: torch.Tensor) -> Outcome:
    count = len(added) - 1
    sums = added.flip(0).cumsum(0)[:count].flip(0)  # [G, D + 1, R]: setting g keeps levels > g
    kept = torch.bincount(kept_by, minlength=count + 1).flip(0).cumsum(0)[:count].flip(0)
    return _outcome(sums, kept, exact)


def _outcome(sums: torch.Tensor, kept: torch.Tensor, exact: torch.Tensor) -> Outcome:
    """``sums`` [G, D + 1, R] of the tiles that each setting keeps, ``kept`` [G] how many."""
    mass = sums[:, -1]
    difference = sums[:, :-1] / mass[:, None] - exact
    square = difference.square().sum((1, 2))
    error = difference.abs_().sum(1)
    return Outcome(error, square, mass.sum(1), kept * TILE)


@dataclass
class Sums:
    """Of one layer of one document: per q head, octave of context and setting.

    ``size`` [H, octaves] is the sum of |O|, ``rows`` and ``causal`` [octaves] count rows and keys;
    by ladder, ``error``, ``square`` (its squares), ``worst`` (of the worst 1% of the rows),
    ``mass``, ``kept`` are [H, octaves, G], ``worst_size`` [H, octaves, G] is the sum of |O| of
    those rows. ``select`` [G] by listed ladder: seconds that all heads' tiles took to choose.
    """

    octaves: list[int]
    size: Array
    rows: Array
    causal: Array
    error: list[Array]
    square: list[Array]
    worst: list[Array]
    worst_size: list[Array]
    mass: list[Array]
    kept: list[Array]
    select: list[Array]


@dataclass
class _Pieces:
    sizes: list[torch.Tensor] = field(default_factory=list)  # [R]
    outcomes: list[list[Outcome]] = field(default_factory=list)
    causal: list[int] = field(default_factory=list)


class LayerRecord:
    """Collects one layer's outcomes over a document's steps.

    ``ladders``: the fused ones, and listed ones behind them. ``layer``: its number, for those.
    """

    def __init__(
        self, heads: int, ladders: Sequence[Ladder] = LADDERS, layer: int | None = None
    ) -> None:
        self._pieces: list[dict[int, _Pieces]] = [{} for _ in range(heads)]
        self._ladders, self._place = ladders, Place(layer, 0, heads)
        self._listed = [ladder for ladder in ladders if ladder.listed]
        self._select = [np.zeros(len(ladder.settings)) for ladder in self._listed]

    def add(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        blocks: Sequence[QBlock],
        prompt_len: int | None = None,
    ) -> None:
        """A step: ``q`` [T, Hq, D] are the last T of the positions of ``k``, ``v`` [S, Hkv, D], of
        a prompt of ``prompt_len`` tokens; S unless given."""
        group = q.shape[1] // k.shape[1]
        masks = self._choose(q, k, v, scale, blocks, prompt_len or len(k))
        measured = []
        for head in range(q.shape[1]):
            if head % group == 0:
                keys, values = (x[:, head // group].float() for x in (k, v))
            rows = q[:, head].float()
            measured.append(
                list(outcomes(rows, keys, values, scale, blocks, masks[head], prompt_len))
            )
        # Copied when all is done: what is kept would lie scattered among the large tensors that it
        # was made with, and keep the allocator from ever using their room as a whole again.
        for pieces, found in zip(self._pieces, measured, strict=True):
            for block, size, by_ladder in found:
                into = pieces.setdefault(octave_of(block.end), _Pieces())
                into.sizes.append(size.clone())
                into.outcomes.append([outcome.clone() for outcome in by_ladder])
                into.causal.append(-(-block.end // TILE) * TILE)

    def _choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        blocks: Sequence[QBlock],
        prompt_len: int,
    ) -> list[list[Masks]]:
        """What each listed setting keeps of the blocks, by head and block; its time is counted."""
        masks: list[list[Masks]] = [[[] for _ in blocks] for _ in range(q.shape[1])]
        every = q_blocks(len(q), len(k))
        at = [every.index(block) for block in blocks]
        widths = [causal_tiles(block.end, TILE) for block in blocks]
        for ladder, seconds in zip(self._listed, self._select, strict=True):
            kept: list[list[Masks]] = [[[] for _ in blocks] for _ in range(q.shape[1])]
            for number, policy in enumerate(ladder.settings):
                began = time.perf_counter()
                chosen = list(
                    kept_by_head(
                        q, [policy] * q.shape[1], self._place, scale, len(k), prompt_len,
                        k.shape[1], lambda head: (k[:, head].contiguous(), v[:, head].contiguous()),
                    )
                )  # fmt: skip
                seconds[number] += time.perf_counter() - began
                for head, tiles in chosen:
                    by_tile = tiles[at].repeat_interleave(policy.tile // TILE, 1)
                    for block, width in enumerate(widths):
                        kept[head][block].append(by_tile[block, :width])
            for of_head, made in zip(masks, kept, strict=True):
                for of_block, its in zip(of_head, made, strict=True):
                    of_block.append(torch.stack(its))
        return masks

    def sums(self) -> Sums:
        """What has been collected, summed up. Raises ValueError if that is nothing."""
        octaves = sorted(self._pieces[0])
        if not octaves:
            raise ValueError("no q block was measured")
        made = [[_summed(pieces[octave]) for octave in octaves] for pieces in self._pieces]

        def stacked(name: str, ladder: int) -> Array:
            return np.array([[octave[name][ladder] for octave in head] for head in made])

        by_ladder = {
            name: [stacked(name, ladder) for ladder in range(len(self._ladders))]
            for name in BY_LADDER
        }
        first = self._pieces[0]
        return Sums(
            octaves,
            np.array([[octave["size"] for octave in head] for head in made], dtype=np.float64),
            np.array([sum(map(len, first[o].sizes)) for o in octaves], dtype=np.float64),
            np.array([sum(first[o].causal) for o in octaves], dtype=np.float64),
            **by_ladder,
            select=self._select,
        )


def _summed(pieces: _Pieces) -> dict[str, list[Array]]:
    size = torch.cat(pieces.sizes).double()
    worst_count = math.ceil(WORST * len(size))
    found: dict[str, list[Array]] = {"size": size.sum().item()}  # type: ignore[dict-item]
    for name in BY_LADDER:
        found[name] = []
    for its in zip(*pieces.outcomes, strict=True):
        error = torch.cat([outcome.error for outcome in its], 1).double()  # [G, rows]
        worst = (error / size.clamp(min=1e-30)).topk(worst_count, 1).indices
        found["error"].append(error.sum(1).numpy())
        found["worst"].append(error.gather(1, worst).sum(1).numpy())
        found["worst_size"].append(size.expand_as(error).gather(1, worst).sum(1).numpy())
        found["square"].append(sum(o.square.double() for o in its).numpy())
        found["mass"].append(sum(o.mass.double() for o in its).numpy())
        found["kept"].append(sum(o.kept.double() for o in its).numpy())
    return found
