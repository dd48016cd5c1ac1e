"""S2-Attention's strided shards (arXiv 2407.17678): each head its own share of the context.

A head keeps every ``stride``-th block of keys, and the next head those that follow: between them
``stride`` heads see everything. Nothing is looked at, so nothing is scored. The paper trains with
it; of a pretrained model it is as good as the heads are that follow it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.view import View


class Strided(ListSelector):
    """Of the blocks of 64 keys those with ``block % stride == head % stride``.

    Heads are counted over the whole layer, whatever the parallelism. ``stride`` 1 keeps everything.
    """

    selector: Literal["strided"] = "strided"
    main_parameter: ClassVar[str] = "stride"
    stride: int = Field(default=8, ge=1, le=1 << 16, description="blocks of 64 keys, one is kept")

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's strides and those around them."""
        return tuple(cls(stride=stride) for stride in (2, 3, 4, 6, 8, 12, 16))

    def keep(self, view: View) -> torch.Tensor:
        """The same for every q block: as `ListSelector.keep`."""
        block = torch.arange(view.num_tiles, device=view.q.device) * view.tile // Q_BLOCK
        own = [block % self.stride == head % self.stride for head in view.heads]
        kept = torch.stack(own)  # [G, tiles]
        return kept[:, None].expand(-1, len(view.blocks), -1)
