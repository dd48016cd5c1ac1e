"""What tests of selectors transcribe papers' rules with: float64, plain loops, nobody's helpers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from _attention import QKV, make_qkv
from hypothesis import strategies as st

from vllm_sparse_backend.selection import ListSelector
from vllm_sparse_backend.selection.kept import kept_tiles
from vllm_sparse_backend.selection.view import View

Array: TypeAlias = npt.NDArray[np.float64]
Tiles: TypeAlias = list[set[int]]  # of each q block

# Rows and tokens of context: blocks in part at both ends, chunks that begin inside a block.
SHAPES = [(1, 1), (64, 64), (70, 300), (1, 400), (130, 463), (600, 600), (500, 1203), (320, 1472)]
SIZES = st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))
SCALE = 0.125


@dataclass(frozen=True)
class Case:
    """One head of one step."""

    q: Array  # [T, D]
    k: Array  # [S, D]
    prompt_len: int

    @property
    def seq_len(self) -> int:
        return len(self.k)

    @property
    def offset(self) -> int:
        return len(self.k) - len(self.q)

    def row(self, position: int) -> Array:
        """The query at a position; zeros where it is not in the step."""
        at = position - self.offset
        return self.q[at] if 0 <= at < len(self.q) else np.zeros(self.q.shape[1])

    def key(self, position: int) -> Array:
        return self.k[position] if position < len(self.k) else np.zeros(self.k.shape[1])

    def present(self, begin: int, end: int) -> list[int]:
        """The positions from ``begin`` to ``end`` that are rows of the step."""
        return [p for p in range(begin, end) if self.offset <= p < self.seq_len]

    def q_blocks(self) -> list[tuple[int, int, int]]:
        """Number, first present row, end."""
        numbers = range(self.offset // 64, (self.seq_len - 1) // 64 + 1)
        return [(n, max(64 * n, self.offset), min(64 * n + 64, self.seq_len)) for n in numbers]


def step(seed: int, rows: int, seq_len: int, heads: int = 2) -> QKV:
    """Queries of some heads, keys and values of one, as `make_qkv`."""
    return make_qkv(seed, rows, seq_len, heads, 1)


def view_of(qkv: QKV, tile: int = 16, prompt_len: int | None = None) -> View:
    q, k, v = qkv
    return View(
        q=q.transpose(0, 1),
        seq_len=len(k),
        tile=tile,
        scale=SCALE,
        prompt_len=len(k) if prompt_len is None else prompt_len,
        heads=tuple(range(q.shape[1])),
        num_heads=q.shape[1],
        layer=0,
        read=lambda: (k[:, 0], v[:, 0]),
    )


def case(qkv: QKV, head: int, prompt_len: int | None = None) -> Case:
    q, k, _ = qkv
    return Case(
        q[:, head].double().numpy(),
        k[:, 0].double().numpy(),
        len(k) if prompt_len is None else prompt_len,
    )


def chunk(qkv: QKV, begin: int, end: int) -> QKV:
    """The step that computes these rows of a prompt."""
    q, k, v = qkv
    return q[begin:end], k[:end], v[:end]


def found(policy: ListSelector, qkv: QKV, prompt_len: int | None = None) -> list[Tiles]:
    """The tiles of each head and q block."""
    kept = kept_tiles(policy, view_of(qkv, policy.tile, prompt_len))
    return [[set(block.nonzero().flatten().tolist()) for block in head] for head in kept]


def in_chunks(policy: ListSelector, qkv: QKV, size: int) -> list[Tiles]:
    """The same of a whole prompt, read so many rows at a time."""
    end = len(qkv[1])
    steps = [chunk(qkv, at, min(at + size, end)) for at in range(0, end, size)]
    parts = [found(policy, step, end) for step in steps]
    return [list(itertools.chain.from_iterable(heads)) for heads in zip(*parts, strict=True)]


def owed(policy: ListSelector, it: Case, keys: Iterable[Iterable[int]]) -> Tiles:
    """The tiles that hold these keys for each q block, with sink, window and diagonal, without
    what is not causal."""
    every = []
    for (number, _, end), wanted in zip(it.q_blocks(), keys, strict=True):
        window = policy.local + int(policy.growth_units * (64 * number + 64)) // 65536
        always = [p for p in range(end) if p < policy.sink or p >= 64 * number - window]
        every.append({p // policy.tile for p in (*wanted, *always) if p < end})
    return every


def of_blocks(it: Case, size: int, blocks: dict[int, set[int]], width: int) -> list[list[int]]:
    """For each q block the keys in the blocks of ``width`` of the ``size`` rows it belongs to."""
    return [
        [p for j in blocks[64 * number // size] for p in range(j * width, (j + 1) * width)]
        for number, _, _ in it.q_blocks()
    ]


def row_blocks(it: Case, size: int) -> range:
    """The numbers of the blocks of ``size`` rows of which some are there."""
    return range(it.offset // size, (it.seq_len - 1) // size + 1)


def softmax(scores: Array) -> Array:
    weight = np.exp(scores - scores.max())
    return np.asarray(weight / weight.sum())


def contains(more: Tiles, less: Tiles) -> bool:
    return all(a >= b for a, b in zip(more, less, strict=True))


def looking(qkv: QKV, key: int, rows: slice) -> QKV:
    """The same with a key that these rows of the first head look at, and nobody else does."""
    q, k, v = (x.clone() for x in qkv)
    q[..., -1] = k[..., -1] = 0
    q[rows, 0, -1], k[key, 0, -1] = 10, 20
    return q, k, v


def poisoned(qkv: QKV, **at: Any) -> QKV:
    """The same with a NaN in the query row or the key at a position."""
    q, k, v = (x.clone() for x in qkv)
    if "row" in at:
        q[at["row"] - (len(k) - len(q))] = torch.nan
    if "key" in at:
        k[at["key"]] = torch.nan
    return q, k, v
