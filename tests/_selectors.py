"""List selectors made for tests, and distributions that ship some, without an installer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from vllm_sparse_backend.selection import ListSelector, registry
from vllm_sparse_backend.selection.view import View


class Nothing(ListSelector):
    """Keeps no tile of its own accord."""

    selector: Literal["nothing"] = "nothing"

    def keep(self, view: View) -> torch.Tensor:
        return torch.zeros(len(view.heads), len(view.blocks), view.num_tiles, dtype=torch.bool)


class Everything(ListSelector):
    """Keeps every tile, those that cannot be seen among them."""

    selector: Literal["everything"] = "everything"

    def keep(self, view: View) -> torch.Tensor:
        return torch.ones(len(view.heads), len(view.blocks), view.num_tiles, dtype=torch.bool)


class Peak(ListSelector):
    """Tiles in which some row's score reaches ``tau`` of its highest: by a loop, one at a time."""

    selector: Literal["peak"] = "peak"
    tau: float = 0.5

    def keep(self, view: View) -> torch.Tensor:
        kept = []
        for block in view.blocks:
            weight = view.scores(view.rows(block)).softmax(2)
            share = weight / weight.amax(2, keepdim=True)
            kept.append(view.by_tile(share).amax(3).amax(1) >= self.tau)
        return torch.stack(kept, 1)


def install(folder: Path, name: str, entries: Mapping[str, str]) -> None:
    """A distribution of that name in ``folder`` with these entry points, as pip would write it."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{registry.GROUP}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def forget() -> None:
    """Have entry points looked for anew."""
    registry.known.cache_clear()
    registry.find.cache_clear()
