"""AnchorAttention (arXiv 2505.23520): key columns that come near the maximum over sink and local.

A row's exact maximum over the first tokens and the local window is its anchor. Means of 128 query
rows are scored with every key before, and a key is kept, for all rows of 16 such means alike, if
one of them comes within ``theta`` of its mean anchor. The released code has the first 2048 tokens
for a sink, and for a window what precedes a row in its own 2048 (16 means of 128 rows).

What is different here: what is kept are tiles of which some key was asked for, not single keys (on
16K tokens of code 1.2 to 1.6 times as many of SmolLM2's, for tiles of 16). q blocks of 64 are
pooled in pairs. The 2048 rows that share their keys are aligned to the position, so that chunks of
a multiple of 2048 change nothing; of a part of them, the part chooses for itself. The released code
leaves out the 128 keys before the 2048 rows, in neither window nor scan: a slip; here they are
scanned. Its attention over sink and window goes on to the kept keys; here the maxima are computed
beside it, which with the released sink is most of what choosing costs.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.products import Scratch, of_these
from vllm_sparse_backend.selection.view import View

POOLED = 2 * Q_BLOCK  # rows of a mean
THETA_MOST = 1000.0  # nats, which is everything
SLICE = 128  # rows whose scores with sink and window there are at a time


class Anchor(ListSelector):
    """Keeps a tile if one of its keys is within ``theta`` of the anchor, for one of the pooled
    rows of a superblock. More is kept with a higher ``theta``."""

    selector: Literal["anchor"] = "anchor"
    main_parameter: ClassVar[str] = "theta"
    sink: int = Field(default=2048, ge=1, le=1 << 20)
    local: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="tokens before the q block always kept; those of its superblock are anyway",
    )
    theta: float = Field(
        default=12.0,
        ge=0.0,
        le=THETA_MOST,
        description="nats below the anchor at which a key is still kept",
    )
    superblock: int = Field(
        default=16, ge=1, le=1 << 10, description="pooled blocks of 128 rows that share their keys"
    )

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's, and from there on with a small sink: of contexts that are not very long 2048
        tokens of sink leave little to choose."""
        thetas = (12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 2.0)
        return (cls(), *(cls(theta=theta, sink=64) for theta in thetas))

    def scaled(self, factor: float) -> Self:
        """The weight e^-theta is what is multiplied."""
        theta = self.theta - math.log(factor) if factor else THETA_MOST
        return self.model_copy(update={"theta": min(max(theta, 0.0), THETA_MOST)})

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`. Scores of a superblock's pooled rows with all keys, 25 MB for 3
        heads at 128K, are the most that there is at a time."""
        device = view.q.device
        before, after = view.offset % POOLED, -view.seq_len % POOLED
        ones = pad(torch.ones(view.q.shape[1], device=device), (before, after))
        rows = ones.unflatten(0, (-1, POOLED)).sum(1)
        k = view.k.float()
        with of_these(view.q, view.k):
            best = self._anchors(view, k)
        anchors = view.scale * pad(best, (before, after)).unflatten(1, (-1, POOLED))
        floor = anchors.sum(2) / rows - self.theta  # [G, pooled blocks]
        q = pad(view.q, (0, 0, before, after)).unflatten(1, (-1, POOLED))
        pooled = view.scale * q.sum(2, dtype=torch.float32) / rows[:, None]

        span = self.superblock * POOLED
        kept = torch.ones(
            len(view.heads), len(view.blocks), view.num_tiles, dtype=torch.bool, device=device
        )
        for start in range(view.offset // span * span, view.seq_len, span):
            own = slice(*_clipped(start, span, POOLED, view.offset // POOLED))
            means = pooled[:, own]
            scores = (means.flatten(0, 1) @ k[:start].T).unflatten(0, means.shape[:2])
            columns = (~(scores < floor[:, own, None])).any(1)  # [G, keys before]; a NaN is near
            tiles = columns.unflatten(1, (-1, self.tile)).any(2) if start else columns
            blocks = slice(*_clipped(start, span, Q_BLOCK, view.first_block))
            kept[:, blocks, : start // self.tile] = tiles[:, None]
        return kept

    def _anchors(self, view: View, k: torch.Tensor) -> torch.Tensor:
        """Each row's maximum over sink and superblock, unscaled, fp32 [G, T]."""
        span, found = self.superblock * POOLED, []
        scratch, begin = Scratch(k.device), view.offset
        while begin < view.seq_len:
            start = begin // span * span
            end = min(begin // SLICE * SLICE + SLICE, start + span, view.seq_len)
            q = view.q[:, begin - view.offset : end - view.offset].float()
            shape, q = q.shape[:2], q.flatten(0, 1)  # one product for all heads
            scores = torch.mm(q, k[start:end].T, out=scratch.empty(len(q), end - start))
            later = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu(1)
            corner = scores.unflatten(0, shape)[..., begin - start :]
            corner.masked_fill_(later, -torch.inf)
            best = scores.amax(1)
            if sink := min(self.sink, start):
                scores = torch.mm(q, k[:sink].T, out=scratch.empty(len(q), sink))
                best = best.maximum(scores.amax(1))
            found.append(best.view(shape))
            begin = end
        return torch.cat(found, 1)


def _clipped(start: int, span: int, size: int, first: int) -> tuple[int, int]:
    """Where the blocks of ``size`` positions of a superblock are, counted from the ``first``."""
    return max(0, start // size - first), (start + span) // size - first
