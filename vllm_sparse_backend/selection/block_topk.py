"""MInference's block-sparse pattern (arXiv 2407.02490, section 3.2).

Mean q of each 64 rows times mean k of each 64 keys; the blocks with the highest products are
computed, 100 of them.

Here the means are of what is there of a block; the released code takes them with the zeros that
fill up the last one. The paper forces nothing: sink, window and diagonal are added as to every
selector, beside the blocks that are counted.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.selection.coarse import Blocks
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.ranking import highest
from vllm_sparse_backend.selection.view import View


class BlockTopK(ListSelector):
    """The ``blocks`` of 64 keys whose mean lies best along the mean of a q block's rows."""

    selector: Literal["block_topk"] = "block_topk"
    main_parameter: ClassVar[str] = "blocks"
    blocks: int = Field(default=100, ge=1, le=1 << 16, description="of 64 keys, for each q block")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's number and those around it."""
        return tuple(cls(blocks=blocks) for blocks in (200, 150, 100, 75, 50, 32, 16))

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        grid = Blocks(view, Q_BLOCK, Q_BLOCK)
        means = view.pooled_k(Q_BLOCK)
        kept = []
        for mean in view.pooled_q():  # [N, D], of one head
            scores = (mean @ means.T).masked_fill(~grid.causal, -torch.inf)
            kept.append(highest(scores, self.blocks))
        return grid.spread(torch.stack(kept))
