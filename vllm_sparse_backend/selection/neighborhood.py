"""Generalized neighborhood attention (arXiv 2504.16922), of one dimension and causal.

Queries come in groups of ``stride``, which share the window of their last one: ``window`` keys that
end with it. A stride of 1 is a sliding window; one as long as the window is blocked attention, in
which a group sees itself alone; those between are strided sliding windows. Where stride and window
are multiples of 64, no more is computed than was asked for.

What is different here: the sink, which has no part in the paper, is kept as everywhere, and so is
what `local` says, nothing by default. A q block keeps what one of its rows may see. In a group that
a prompt or its chunk ends within, the paper takes the last query that is there for the last; here
it is the group's last position, so that chunks change nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.view import View


class Neighborhood(ListSelector):
    """Looks at nothing but positions. ``stride`` 1: sliding window; ``stride`` as ``window``:
    blocked."""

    selector: Literal["neighborhood"] = "neighborhood"
    main_parameter: ClassVar[str] = "window"
    local: int = Field(default=0, ge=0, le=1 << 20)
    window: int = Field(default=2048, ge=1, le=1 << 20, description="keys up to a group's last")
    stride: int = Field(
        default=256, ge=1, le=1 << 20, description="queries of a group; at most the window"
    )

    @model_validator(mode="after")
    def _stride_within_window(self) -> Self:
        if self.stride > self.window:
            raise ValueError(
                f"stride: want at most the window, {self.window}, got {self.stride}: the first "
                "queries of a group would see nothing"
            )
        return self

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """Windows by halves, the last one blocked."""
        return tuple(cls(window=window) for window in (8192, 4096, 2048, 1024, 512, 256))

    def keep(self, view: View) -> torch.Tensor:
        """The same for every head: as `ListSelector.keep`."""
        # Of a q block the first row sees farthest back.
        leaders = view.starts // self.stride * self.stride + self.stride - 1
        first = leaders[:, None] - self.window + 1
        tile_end = torch.arange(1, view.num_tiles + 1, device=view.q.device) * self.tile
        return (tile_end > first).expand(len(view.heads), -1, -1)
