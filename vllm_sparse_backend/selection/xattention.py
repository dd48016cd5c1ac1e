"""XAttention's antidiagonal scores (arXiv 2503.16428).

Of every S consecutive keys one long vector is made, and of every S consecutive rows one in reverse
order: their product is the sum over an antidiagonal of a square of scores. Divided by S, these go
through a softmax over all squares that are not later than the rows'; what is in a block of 128 x
128 is summed; and each block of rows computes the smallest set of blocks that holds the share tau
of its sum, the first column and the diagonal counted first. The paper takes S 8 or 16 and tau 0.9.

Here q blocks are 64 rows: the two that are a block of 128 are judged as one and compute the same,
unless ``block`` is 64 (which OpenVINO GenAI takes). Squares are aligned to position 0; of one that
a chunk has in part, the rows that are not there count as zeros, as those behind a prompt's end do
in the released code. The paper's offline search of a threshold per head is not done: a profile has
one.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_sparse_backend.selection.coarse import Blocks, in_parts
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.products import of_these
from vllm_sparse_backend.selection.view import View


class XAttention(ListSelector):
    """The blocks that hold the share ``tau`` of the antidiagonals' mass. At 1 it keeps all."""

    selector: Literal["xattention"] = "xattention"
    main_parameter: ClassVar[str] = "tau"
    tau: float = Field(default=0.9, ge=0.0, le=1.0, description="share of the mass that is kept")
    stride: Literal[4, 8, 16, 32, 64] = Field(
        default=8, description="rows and keys of a square, of which an antidiagonal is summed"
    )
    block: Literal[64, 128] = Field(default=128, description="rows and keys of a block")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """Shares about the paper's."""
        return tuple(cls(tau=tau) for tau in (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5))

    def scaled(self, factor: float) -> Self:
        """The share that may be left out is what is multiplied."""
        return self.model_copy(update={"tau": max(0.0, 1.0 - (1.0 - self.tau) * factor)})

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        if self.tau == 1.0:
            return view.causal.expand(len(view.heads), -1, -1)
        return in_parts(self._keep, view)

    def _keep(self, view: View) -> torch.Tensor:
        size, grid = self.stride, Blocks(view, self.block, self.block)
        squares = Blocks(view, size, size)
        keys = pad(view.k, (0, 0, 0, -view.seq_len % size)).float().reshape(squares.num_keys, -1)
        later = torch.arange(squares.num_keys, device=keys.device) > squares.numbers
        weight = torch.empty_like(later, dtype=keys.dtype)  # fresh memory for each head costs more
        kept = []
        for query in view.q:
            rows = squares.by_rows(query.float()).flip(1).flatten(1)
            with of_these(view.q, view.k):
                torch.mm(rows, keys.T, out=weight)
            weight.mul_(view.scale / size).masked_fill_(later, -torch.inf)
            torch.softmax(weight, 1, out=weight)
            mass = _sums(weight, squares.first % (self.block // size), self.block // size)
            kept.append(_smallest(mass, grid, self.tau))
        return grid.spread(torch.stack(kept))


def _sums(weight: torch.Tensor, before: int, size: int) -> torch.Tensor:
    """Sums over ``size`` x ``size`` elements, the first ``before`` rows of the first missing."""
    rows, columns = weight.shape
    padded = pad(weight, (0, -columns % size, before, -(before + rows) % size))
    return padded.unflatten(0, (-1, size)).sum(1).unflatten(1, (-1, size)).sum(2)


def _smallest(mass: torch.Tensor, grid: Blocks, tau: float) -> torch.Tensor:
    """The fewest of each row's blocks that hold the share ``tau`` of its sum, and a NaN's row.

    ``mass`` is [N, M] of one head. The first column and the diagonal are counted before all others.
    """
    column = torch.arange(grid.num_keys, device=mass.device)
    forced = (column == 0) | (column == grid.numbers)
    order = mass.masked_fill(forced, torch.inf).argsort(1, descending=True)
    ordered = mass.gather(1, order).double()
    before = ordered.cumsum(1) - ordered
    enough = before >= tau * ordered.sum(1, keepdim=True)
    return forced | torch.zeros_like(forced).scatter(1, order, ~enough)
