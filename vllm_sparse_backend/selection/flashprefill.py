"""FlashPrefill's thresholding (arXiv 2603.06199).

Every query row meets the mean of every 128 keys that lie before it; a block's score is the sum of
the exponentials over the 128 rows of a q block, and blocks whose score is at least ``alpha`` of the
highest of the row of blocks are computed: nothing is sorted or summed up. The first 2 and the last
4 blocks of a row of blocks are computed, too, and everything for the last 2 blocks of rows. The
released code has alpha 0.18 for Llama, 0.08 for Qwen2.5, 0.12 for Qwen3's MoE.

Here q blocks are 64 rows: the two that are a block of 128 are judged as one and compute the same,
unless ``block`` is 64. The first 2 blocks are the default of ``sink``, and of ``local`` is as much
as 4 of 128 are before the second half of the last. The last rows are the whole prompt's, not each
chunk's, where its length is known. Rows of a block that are not there when a chunk begins or ends
inside it have no say.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.selection.coarse import Blocks, in_parts
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.view import View


class FlashPrefill(ListSelector):
    """Blocks whose score reaches ``alpha`` of the best block's. At 0 it keeps all."""

    selector: Literal["flashprefill"] = "flashprefill"
    main_parameter: ClassVar[str] = "alpha"
    sink: int = Field(default=256, ge=1, le=1 << 20)
    local: int = Field(default=448, ge=0, le=1 << 20)
    alpha: float = Field(default=0.18, ge=0.0, le=1.0, description="share of the best score")
    last: int = Field(
        default=2, ge=0, le=1 << 14, description="last blocks of the prompt's rows, all computed"
    )
    block: Literal[64, 128] = Field(default=128, description="rows and keys of a block")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's three, and those around them."""
        return tuple(cls(alpha=alpha) for alpha in (0.01, 0.02, 0.04, 0.08, 0.12, 0.18, 0.3, 0.5))

    def scaled(self, factor: float) -> Self:
        """With that multiple of ``alpha``."""
        return self.model_copy(update={"alpha": min(1.0, self.alpha * factor)})

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        return in_parts(self._keep, view)

    def _keep(self, view: View) -> torch.Tensor:
        grid = Blocks(view, self.block, self.block)
        means = view.pooled_k(self.block)
        position = torch.arange(view.offset, view.seq_len, device=means.device)[:, None]
        last_key = torch.arange(1, grid.num_keys + 1, device=means.device) * self.block - 1
        kept = []
        for query in view.q:
            scores = (query.float() * view.scale) @ means.T  # [T, M]
            scores.masked_fill_(last_key > position, -torch.inf)
            scores = grid.by_rows(scores, -torch.inf)  # [N, rows, M]
            # Of a block of rows that sees no whole block, anything finite.
            highest = scores.amax((1, 2), keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
            score = (scores - highest).exp_().sum(1)
            kept.append(~(score < self.alpha * score.amax(1, keepdim=True)))
        dense = grid.numbers >= -(-view.prompt_len // self.block) - self.last
        return grid.spread(torch.stack(kept) | dense)
