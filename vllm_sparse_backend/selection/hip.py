"""HiP attention (arXiv 2502.08910, in three stages): ever smaller chunks, the best at each size.

Chunks of 256 keys are ranked and 32768 keys' worth of them kept; these are cut into chunks of 32,
of which 8192 keys' worth are kept, and these into the last ones, of which 2048. A chunk's
representative is found by halving: of its halves the one whose middle key scores higher, and of
that one's halves again, down to one key; the chunk scores what the best of these keys did, for the
best of a q block's rows. Rows are averaged four by four in the first two stages. The first 256 keys
and 1024 before the q block are always kept, the first three layers are dense.

What is different here: the last chunks are tiles, of 16 keys and not of 8; they lie at multiples of
their size and not at those behind the sink, which is the same for the paper's sink. No key of the
window is a representative, for which the last one before it is asked: of a chunk's end that lies in
the window, some may not be there yet while a part of a prompt is read. The paper scores with
positions that grow no larger than those trained with, which is how it extends the context; here
keys and queries are compared as they are, after RoPE. (A model's last layer, also dense in the
released configuration, is one of the profile's to name.)

What it costs grows little with a context that is longer than what the stages keep, but is much: in
the last stage all rows of a q block meet half of the keys of 512 tiles.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.products import Scratch, of_these
from vllm_sparse_backend.selection.view import View

CHUNKS = (256, 32)  # keys, of the first two stages
AVERAGED = 4  # rows, in the first two stages
SLICE = 4  # q blocks whose candidates' keys are gathered at a time


class HiP(ListSelector):
    """Keeps ``k`` keys' worth of tiles, chosen from ``k_second`` keys' worth of chunks of 32, which
    are chosen from ``k_first`` keys' worth of chunks of 256."""

    selector: Literal["hip"] = "hip"
    main_parameter: ClassVar[str] = "k"
    sink: int = Field(default=256, ge=1, le=1 << 20)
    local: int = Field(default=1024, ge=0, le=1 << 20)
    k: int = Field(default=2048, ge=64, le=1 << 20, description="keys kept beside sink and window")
    k_second: int = Field(default=8192, ge=64, le=1 << 22, description="keys of kept chunks of 32")
    k_first: int = Field(default=32768, ge=64, le=1 << 24, description="keys of kept chunks of 256")
    dense_layers: int = Field(default=3, ge=0, le=1 << 10, description="first layers kept dense")

    @model_validator(mode="after")
    def _narrower_by_stage(self) -> Self:
        if not self.k <= self.k_second <= self.k_first:
            raise ValueError(
                "k: want no stage to keep more than the one before, k <= k_second <= k_first, got "
                f"{self.k}, {self.k_second}, {self.k_first}"
            )
        return self

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's k and those around it."""
        return tuple(cls(k=k) for k in (8192, 4096, 2048, 1024, 512, 256, 128))

    @property
    def _budgets(self) -> tuple[int, int, int]:
        return self.k_first, self.k_second, self.k

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`. The keys of 4 q blocks' candidates are gathered at a time: 6 MB
        for 3 heads, whatever the length."""
        if view.layer is not None and view.layer < self.dense_layers:
            return view.causal.expand(len(view.heads), -1, -1)
        k = view.k.float()
        rows, means = _rows(view)
        kept = torch.zeros(
            len(view.heads), len(view.blocks), view.num_tiles, dtype=torch.bool, device=k.device
        )
        search = _Search(view, k)
        for first in range(0, len(view.blocks), SLICE):
            own = slice(first, first + SLICE)
            # Where each q block's window begins; of what lies behind it nothing is chosen.
            limits = [max(0, b.start - self.window_at(b.start + Q_BLOCK)) for b in view.blocks[own]]
            found, unknown = self._chosen(search, rows[:, own], means[:, own], limits)
            tiles = -(-max(limits) // self.tile)
            kept[:, own, :tiles] = found[..., :tiles] | unknown[..., None]
        return kept

    def _chosen(
        self, search: _Search, rows: torch.Tensor, means: torch.Tensor, limits: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tiles chosen by some q blocks, bool [G, blocks, tiles or more], and which of the
        blocks met a NaN.

        ``rows`` [G, blocks, 64, D] and ``means`` [G, blocks, 16, D] of their queries.
        """
        device = rows.device
        heads, blocks = rows.shape[:2]
        each = [torch.full((1, 1), limit, device=device) for limit in limits]  # and no copy
        limit = torch.cat(each).expand(heads, -1, -1)  # [G, blocks, 1]
        sizes = (CHUNKS[0], max(CHUNKS[1], self.tile), self.tile)
        width = max(limits)
        starts = torch.arange(0, width, sizes[0], device=device).expand(heads, blocks, -1)
        candidate = (starts < limit) & (starts + sizes[0] > self.sink)
        unknown = torch.zeros(heads, blocks, dtype=torch.bool, device=device)
        for stage, (size, budget) in enumerate(zip(sizes, self._budgets, strict=True)):
            if stage:  # cut what the last stage has kept
                cuts = torch.arange(0, sizes[stage - 1], size, device=device)
                starts = (starts[..., None] + cuts).flatten(2)
                candidate = candidate.repeat_interleave(len(cuts), 2)
                candidate = candidate & (starts < limit) & (starts + size > self.sink)
            if (count := budget // size) >= starts.shape[2]:
                continue
            last = stage == len(sizes) - 1
            scores = search.scores(rows if last else means, starts, size, limit, exact=last)
            scores = scores.masked_fill(~candidate, -torch.inf)
            unknown |= scores.isnan().any(2)
            # Of equals the earlier ones; and in the order of their positions, for the next stage.
            best = scores.argsort(dim=2, descending=True, stable=True)[..., :count].sort(2).values
            starts, candidate = starts.gather(2, best), candidate.gather(2, best)
        tiles = -(-(width + sizes[0]) // self.tile)
        chosen = torch.zeros(heads, blocks, tiles, dtype=torch.bool, device=device)
        # Candidates are distinct; what is none goes to the place behind all of them.
        places = (starts // self.tile).where(candidate, tiles - 1)
        return chosen.scatter_(2, places, True), unknown


def _rows(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Each q block's rows [G, blocks, 64, D], and their means by four, fp32 [G, blocks, 16, D].

    Where a row is missing another of the block stands for it, which leaves a maximum as it is; a
    mean is of the rows that are there.
    """
    position = torch.arange(Q_BLOCK, device=view.q.device)
    start = view.starts[:, None]
    at = (start + position).clamp(view.offset, view.seq_len - 1)
    whole = view.q[:, at - view.offset]  # [G, blocks, 64, D]
    there = (at == start + position)[..., None].unflatten(1, (-1, AVERAGED))
    sums = (whole.float().unflatten(2, (-1, AVERAGED)) * there).sum(3)
    # [blocks, 16]: each itself, or the nearest that is there.
    groups = at[:, ::AVERAGED] // AVERAGED - start // AVERAGED
    means = sums / there.sum(2).clamp(min=1)
    index = groups[None, ..., None].expand(len(means), -1, -1, means.shape[3])
    return whole, means.gather(2, index)


class _Search:
    """For the best keys of chunks, by halving."""

    def __init__(self, view: View, k: torch.Tensor) -> None:
        self._view, self._k = view, k  # k: the view's in fp32
        self._keys, self._products = Scratch(k.device), Scratch(k.device)

    def scores(
        self,
        queries: torch.Tensor,
        starts: torch.Tensor,
        size: int,
        limit: torch.Tensor,
        exact: bool,
    ) -> torch.Tensor:
        """What the best key scored that halving came upon in each chunk, unscaled, fp32
        [G, blocks, chunks].

        ``queries`` [G, blocks, rows, D], the view's own if ``exact``; ``starts``
        [G, blocks, chunks] of chunks of ``size`` keys; for keys from ``limit`` [G, blocks, 1] on
        the last one before it is asked.
        """
        view = self._view
        with of_these(view.q, view.k) if exact else nullcontext():
            return self._halved(queries.float().flatten(0, 1), starts, size, limit)

    def _halved(
        self, queries: torch.Tensor, starts: torch.Tensor, size: int, limit: torch.Tensor
    ) -> torch.Tensor:
        best = torch.full(starts.shape, -torch.inf, device=starts.device)
        last = (limit - 1).clamp(0)[..., None]
        count, rows, dim = queries.shape
        while size > 1:
            half = size // 2
            middle = torch.arange(2, device=starts.device) * half + half // 2
            at = (starts[..., None] + middle).minimum(last)  # [G, blocks, chunks, 2]
            keys = self._keys.empty(at.numel(), dim)
            keys = torch.index_select(self._k, 0, at.flatten(), out=keys).view(count, -1, dim)
            products = self._products.empty(count, rows, keys.shape[1])
            torch.bmm(queries, keys.transpose(1, 2), out=products)
            scores = products.amax(1).view_as(at)
            best = best.maximum(scores.amax(3))
            starts = starts.add(scores[..., 1] > scores[..., 0], alpha=half)
            size = half
        return best
