"""A method's own blocks, larger than q blocks and tiles, and how they lie on ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.selection.view import View

ROWS_AT_ONCE = 2048  # of `in_parts`; a multiple of every method's block


@dataclass(frozen=True, eq=False)
class Blocks:
    """The rows of a view in blocks of ``rows`` positions, its keys in blocks of ``keys``.

    Aligned to position 0, as q blocks and tiles are: where rows are 128, q blocks 2i and 2i + 1
    are one. Of the N blocks of rows the first and the last may be there in part, as may the last
    of the M blocks of keys.
    """

    view: View
    rows: int
    keys: int

    @property
    def first(self) -> int:
        """The number of the first block of rows, counted from position 0."""
        return self.view.offset // self.rows

    @property
    def num_rows(self) -> int:
        """N."""
        return -(-self.view.seq_len // self.rows) - self.first

    @property
    def num_keys(self) -> int:
        """M."""
        return -(-self.view.seq_len // self.keys)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """The numbers of the blocks of rows, counted from position 0, int64 [N, 1]."""
        return self.first + torch.arange(self.num_rows, device=self.view.q.device)[:, None]

    @cached_property
    def causal(self) -> torch.Tensor:
        """bool [N, M]: blocks of keys that begin before the block of rows ends."""
        first_key = torch.arange(self.num_keys, device=self.view.q.device) * self.keys
        return first_key < (self.numbers + 1) * self.rows

    def by_rows(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """[..., T, d] to [..., N, rows, d]; rows that are not there are ``value``."""
        before, after = self.view.offset % self.rows, -self.view.seq_len % self.rows
        return pad(x, (0, 0, before, after), value=value).unflatten(-2, (-1, self.rows))

    def mean_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of what is there of each block of rows, [..., T, d] to [..., N, d]."""
        there = self.by_rows(torch.ones_like(x[..., :1]))
        return self.by_rows(x).sum(-2) / there.sum(-2)

    def mean_keys(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of what is there of each block of keys, [n, d] to [blocks of n, d]; ``x`` is of
        all keys, or of some of which the first begins a block."""
        missing = -len(x) % self.keys
        whole = pad(x, (0, 0, 0, missing)) if missing else x
        sums = whole.unflatten(0, (-1, self.keys)).sum(1)
        counts = torch.full_like(sums[:, :1], self.keys)
        counts[-1] -= missing
        return sums / counts

    def spread(self, kept: torch.Tensor) -> torch.Tensor:
        """What is kept of a method's blocks, bool [..., N, M], as [..., q blocks, tiles].

        Both sizes are multiples of 64.
        """
        view = self.view
        tiles = torch.arange(view.num_tiles, device=kept.device) * view.tile // self.keys
        return kept[..., view.starts // self.rows - self.first, :][..., tiles]


def in_parts(choose: Callable[[View], torch.Tensor], view: View) -> torch.Tensor:
    """The tiles that ``choose`` keeps, asked for at most `ROWS_AT_ONCE` of the rows at a time, so
    that what it needs memory for is bounded however long the view is.

    For rules whose choice does not depend on how a prompt is cut into chunks: each part is a view
    as of a chunk.
    """
    if view.q.shape[1] <= ROWS_AT_ONCE:
        return choose(view)
    kept = []
    edges = range((view.offset // ROWS_AT_ONCE + 1) * ROWS_AT_ONCE, view.seq_len, ROWS_AT_ONCE)
    begin = view.offset
    for end in (*edges, view.seq_len):
        part = choose(_part(view, begin, end))
        kept.append(pad(part, (0, view.num_tiles - part.shape[2])))
        begin = end
    return torch.cat(kept, 1)


def _part(view: View, begin: int, end: int) -> View:
    rows = slice(begin - view.offset, end - view.offset)
    return replace(view, q=view.q[:, rows], seq_len=end, read=lambda: (view.k[:end], view.v[:end]))
