"""FlexPrefill (arXiv 2502.20766): each head's pattern and budget from the last queries.

The last 128 queries are asked: softmax over all keys, averaged. Where their mean, times the means
of 128 keys each, tells the same distribution over blocks of keys, as the square root of the
Jensen-Shannon divergence below ``distance`` has it, the head is *query-aware*: of the softmax over
the means of every 128 rows and 128 keys the highest entries are computed, over the whole map
together, up to the share ``gamma`` of its mass. Any other head is *vertical-slash*: as many blocks
of columns and of diagonals as single columns and diagonals take to hold ``gamma`` of the last
queries' mass, those with the most. At least ``min_budget`` tokens of columns and of diagonals are
computed for all heads, the first column and the main diagonal among them. The paper takes gamma 0.9
to 0.95, a distance of 0.1 and 1024 tokens.

As in the released code, a query-aware map is joined with the minimal vertical-slash set, and its
entries sum up to at most gamma.

Here the last queries are those of the step, and the map is the step's: of a prompt that is read in
chunks each is judged by its own end. Q blocks are 64 rows: the two that are a block of 128 are
judged as one and compute the same, unless ``block`` is 64, when 64 queries are asked. Diagonals are
counted in blocks from the main one; in the code from the map's far corner, which is the same for
whole blocks.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_sparse_backend.selection.coarse import Blocks
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.probe import Probe, probes
from vllm_sparse_backend.selection.ranking import highest
from vllm_sparse_backend.selection.view import View


class FlexPrefill(ListSelector):
    """Query-aware or vertical-slash, to ``gamma`` of the mass. At 1 it keeps all."""

    selector: Literal["flexprefill"] = "flexprefill"
    main_parameter: ClassVar[str] = "gamma"
    gamma: float = Field(default=0.95, ge=0.0, le=1.0, description="share of the mass that is kept")
    distance: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="divergence (its square root) below which a head is query-aware; 0: none is",
    )
    min_budget: int = Field(
        default=1024, ge=1, le=1 << 20, description="tokens of columns and of diagonals, at least"
    )
    block: Literal[64, 128] = Field(default=128, description="rows and keys of a block")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """Shares about the paper's."""
        return tuple(cls(gamma=gamma) for gamma in (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5))

    def scaled(self, factor: float) -> Self:
        """The share that may be left out is what is multiplied."""
        return self.model_copy(update={"gamma": max(0.0, 1.0 - (1.0 - self.gamma) * factor)})

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        if self.gamma == 1.0:
            return view.causal.expand(len(view.heads), -1, -1)
        grid, keys = Blocks(view, self.block, self.block), view.k.float()
        means = grid.mean_keys(keys)
        heads = zip(view.q, probes(view, keys, self.block), strict=True)
        return grid.spread(torch.stack([self._head(grid, means, *head) for head in heads]))

    def _head(
        self, grid: Blocks, means: torch.Tensor, query: torch.Tensor, found: Probe
    ) -> torch.Tensor:
        """One head's blocks, bool [N, M], by its ``query`` [T, D] and K's ``means`` [M, D]."""
        view, (columns, diagonals) = grid.view, found
        if columns.isnan().any():
            return torch.ones_like(grid.causal)
        vertical, slash = self._sums(columns), self._sums(diagonals)
        mean = query[view.last(self.block)].float().mean(0)
        estimated = ((means @ mean) * view.scale).softmax(0)
        aware = _distance(estimated, vertical) < self.distance
        least = -(-self.min_budget // self.block)
        lines = []
        for mass, sums in ((columns, vertical), (diagonals, slash)):
            sums[0] = torch.inf
            lines.append(highest(sums, least if aware else max(least, self._blocks(mass))))
        # How many blocks of keys one lies before the block of rows; behind it, anything.
        before = grid.numbers - torch.arange(grid.num_keys, device=means.device)
        kept = lines[0] | lines[1][before.clamp(min=0)]
        return kept | self._map(grid, means, query) if aware else kept

    def _sums(self, mass: torch.Tensor) -> torch.Tensor:
        """[S] to [M], by blocks."""
        return pad(mass, (0, -len(mass) % self.block)).unflatten(0, (-1, self.block)).sum(1)

    def _blocks(self, mass: torch.Tensor) -> int:
        """Blocks with as many columns or diagonals as hold ``gamma`` of the mass, and one more."""
        ordered = mass.sort(descending=True).values.double()
        return (int((ordered.cumsum(0) <= self.gamma).sum()) + 1) // self.block + 1

    def _map(self, grid: Blocks, means: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """The highest of the whole map, [N, M], up to ``gamma`` of its mass."""
        scores = grid.mean_rows(query.float()) @ means.T * grid.view.scale
        mass = scores.masked_fill(~grid.causal, -torch.inf).softmax(1).flatten()
        ordered, order = mass.sort(descending=True)
        kept = ~(ordered.double().cumsum(0) > self.gamma * grid.num_rows)
        return torch.zeros_like(kept).scatter(0, order, kept).view_as(grid.causal)


def _distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """The square root of the Jensen-Shannon divergence of two distributions, in nats."""
    mean = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)  # where both are 0
    terms = torch.special.xlogy(p, p / mean) + torch.special.xlogy(q, q / mean)
    return float((terms.sum() / 2).clamp(min=0).sqrt())
