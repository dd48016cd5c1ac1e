"""LongHeads (arXiv 2402.10685): of chunks of 256 keys each head takes those that suit its query.

A chunk is represented by one vector. The chunks with the highest products of query and
representative are kept within a budget of 4096 tokens, which has the first chunk, the query's own
and the one before it in it. Prompts shorter than the budget are dense.

What is different here: the paper extends the context by giving kept chunks new positions; that is
left out, and keys and queries are compared as they are, after RoPE. A representative there is found
by attention of the chunk's queries within the chunk; queries of earlier chunks are gone when a
later part of a prompt is read, and the mean key is the representative (what that attends to among
the chunk's keys held less of the attention on real text). Every token chooses for itself there, and
here a q block, by its mean query.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.ranking import highest
from vllm_sparse_backend.selection.view import View


class LongHeads(ListSelector):
    """Keeps a budget of chunks: the first, a q block's own and that before it, and then those
    whose representatives its mean query looks at most."""

    selector: Literal["longheads"] = "longheads"
    main_parameter: ClassVar[str] = "budget"
    budget: int = Field(default=4096, ge=64, le=1 << 24, description="keys a q block is given")
    chunk: int = Field(default=256, ge=64, le=1 << 14, multiple_of=64, description="keys a chunk")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's budget and those around it."""
        return tuple(cls(budget=budget) for budget in (8192, 6144, 4096, 3072, 2048, 1536, 1024))

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        scores = view.pooled_q() @ view.pooled_k(self.chunk).T  # [G, blocks, chunks]
        chunk = torch.arange(scores.shape[2], device=scores.device)
        away = (view.starts // self.chunk)[:, None] - chunk
        forced = (chunk == 0) | (away == 0) | (away == 1)
        scores = scores.masked_fill(away < 0, -torch.inf).masked_fill(forced, torch.inf)
        kept = highest(scores, self.budget // self.chunk) | forced
        return kept.repeat_interleave(self.chunk // self.tile, 2)[..., : view.num_tiles]
