"""SpargeAttn's selection (arXiv 2502.18137, section 3.3).

Rows in blocks of 128 and keys in blocks of 64 are taken for their means where they are alike: where
the mean cosine similarity of all pairs in a block is above a bound. Blocks of keys that are not are
computed for all rows, and blocks of rows that are not compute all keys. For the others, of the
softmax over the products of the means the highest entries are computed, as many as sum up to at
most tau, and at least one. Bound and tau are searched per layer and head in the paper; 0.6 and 0.98
are the released code's defaults.

Here q blocks are 64 rows: the two that are a block of 128 are judged as one and compute the same,
unless ``rows`` is 64 (as the released code has it on Hopper, with keys by 128). With ``smooth_k``
the mean of all keys, of those there are at that step, is subtracted before they are compared, as
the released code does for SageAttention's sake: of SmolLM2's blocks on source code 25% are alike
then, and 86% without. The paper's second stage, skipping the product with V in an attention kernel,
is none of a selector; `skip_softmax` has its criterion.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.selection.coarse import Blocks
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.view import View

KEYS: Final = 64  # of a block
KEYS_AT_ONCE: Final = 8192


class Sparge(ListSelector):
    """The share ``tau`` of the means' softmax, where rows and keys are alike. At 1 it keeps all."""

    selector: Literal["sparge"] = "sparge"
    main_parameter: ClassVar[str] = "tau"
    tau: float = Field(default=0.98, ge=0.0, le=1.0, description="share of the mass that is kept")
    alike: float = Field(
        default=0.6,
        ge=-1.0,
        le=1.0,
        description="mean cosine similarity above which a block's mean stands for it",
    )
    smooth_k: bool = Field(default=False, description="compare keys less the mean of all of them")
    rows: Literal[64, 128] = Field(default=128, description="rows of a block")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """Shares about the released code's."""
        return tuple(cls(tau=tau) for tau in (0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6))

    def scaled(self, factor: float) -> Self:
        """The share that may be left out is what is multiplied."""
        return self.model_copy(update={"tau": max(0.0, 1.0 - (1.0 - self.tau) * factor)})

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        if self.tau == 1.0:
            return view.causal.expand(len(view.heads), -1, -1)
        grid = Blocks(view, self.rows, KEYS)
        middle = view.k.mean(0, dtype=torch.float32) if self.smooth_k else 0.0
        pooled, directions = [], []
        for part in view.k.split(KEYS_AT_ONCE):
            pooled.append(grid.mean_keys(keys := part.float()))
            directions.append(grid.mean_keys(_directions(keys - middle)))
        means, unlike_keys = torch.cat(pooled), self._unlike(torch.cat(directions))  # [M, D], [M]
        kept = []
        for query in view.q:
            rows = query.float()
            scores = grid.mean_rows(rows * view.scale) @ means.T  # [N, M]
            scores = scores.masked_fill(unlike_keys | ~grid.causal, -torch.inf)
            unlike_rows = self._unlike(grid.mean_rows(_directions(rows)))  # [N]
            kept.append(unlike_keys | unlike_rows[:, None] | _highest(scores.softmax(1), self.tau))
        return grid.spread(torch.stack(kept))

    def _unlike(self, means: torch.Tensor) -> torch.Tensor:
        """[n, d] means of directions: the square of its length is the mean over all pairs."""
        return ~(means.square().sum(1) > self.alike)


def _directions(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def _highest(mass: torch.Tensor, tau: float) -> torch.Tensor:
    """The highest of each row of [N, M], up to a sum of ``tau``; at least one. All, of a NaN."""
    ordered, order = mass.sort(1, descending=True)
    kept = ~(ordered.double().cumsum(1) > tau)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(1, order, kept)
