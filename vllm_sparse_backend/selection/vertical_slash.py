"""MInference's vertical-slash pattern (arXiv 2407.02490, section 3.2).

The last 64 queries are asked: softmax over all keys, summed by column and by diagonal. Every row
then sees the columns and the diagonals with the most mass, the first 30 columns and the 100
nearest diagonals among them. The released search chooses a head's two numbers from (30, 800),
(100, 800), (100, 750), (500, 700), (3500, 100) and (1000, 4096); 1000 and 6096 are what the
released code takes for a head that its file does not list.

Here the last queries are those of the step: of a prompt that is read in chunks each is judged by
its own end. Where the released kernel gathers single columns, whole tiles are computed.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal, Self

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.probe import probes
from vllm_sparse_backend.selection.ranking import highest
from vllm_sparse_backend.selection.view import View

PROBED: Final = 64  # last rows of a step
FORCED_COLUMNS: Final = 30
FORCED_DIAGONALS: Final = 100


class VerticalSlash(ListSelector):
    """The ``columns`` keys and the ``diagonals`` distances with the most mass in the last rows."""

    selector: Literal["vertical_slash"] = "vertical_slash"
    main_parameter: ClassVar[str] = "diagonals"
    columns: int = Field(
        default=1000,
        ge=FORCED_COLUMNS,
        le=1 << 20,
        description="keys that every row sees, the first 30 among them",
    )
    diagonals: int = Field(
        default=6096,
        ge=FORCED_DIAGONALS,
        le=1 << 20,
        description="distances at which every row sees, the 100 smallest among them",
    )

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """Published pairs that are nested, and some between and below them."""
        pairs = (
            (1000, 6096),
            (1000, 4096),
            (1000, 2048),
            (500, 1400),
            (500, 700),
            (100, 700),
            (30, 400),
            (30, 100),
        )
        return tuple(cls(columns=columns, diagonals=diagonals) for columns, diagonals in pairs)

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        found = probes(view, view.k.float(), PROBED)
        return torch.stack([self._head(view, *head) for head in found])

    def _head(self, view: View, columns: torch.Tensor, diagonals: torch.Tensor) -> torch.Tensor:
        unknown = columns.isnan().any()
        columns[:FORCED_COLUMNS] = torch.inf
        diagonals[:FORCED_DIAGONALS] = torch.inf
        vertical = view.by_tile(highest(columns, self.columns)).any(1)
        return vertical | slashes(view, highest(diagonals, self.diagonals)) | unknown


def slashes(view: View, at: torch.Tensor) -> torch.Tensor:
    """The tiles that hold, for some row of a q block, a key at a distance before it where ``at``,
    bool [S], says so. Returns bool [blocks, tiles]."""
    device = view.q.device
    # below[d]: how many such distances are less than d, so that a range's number is a difference.
    below = pad(at.cumsum(0), (1, 0))
    first, end = view.firsts[:, None], view.ends[:, None]
    key = torch.arange(view.num_tiles, device=device) * view.tile  # each tile's first
    nearest = (first - (key + view.tile - 1)).clamp(min=0)  # from the first row to its last key
    farthest = (end - 1 - key).clamp(min=-1)  # from the last row to its first key
    return below[farthest + 1] > below[nearest]
