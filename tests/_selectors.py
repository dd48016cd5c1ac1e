"""List selectors made for tests, distributions that ship some, without an installer, and what is
measured of any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from _engine import Scenario, generate
from _models import token_ids
from _parallel import write_profile

from vllm_sparse_backend.selection import ListSelector, registry
from vllm_sparse_backend.selection.kept import kept_tiles
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


def most_memory(policy: ListSelector, view: View) -> int:
    """The most bytes there are at a time while it chooses, beside the view's own."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiled:
        kept_tiles(policy, view)
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def assert_served(model: Path, layers: list[list[dict[str, Any]]], folder: Path) -> None:
    """An engine answers under these policies, by layer and head, in chunks of any size, and
    leaves tiles out."""
    prompts = [token_ids(seed, length) for seed, length in enumerate((3000, 40, 1200, 700))]
    profile = str(write_profile(folder / "p.json", layers))
    config = {"min_prompt_tokens": 64, "dense_core": False, "profile": profile}
    scenarios = [
        Scenario(
            str(model),
            [prompts],
            config=config,
            engine={"max_num_batched_tokens": size, "max_num_seqs": 8},
        )
        for size in (300, 4096)
    ]
    for result in generate(scenarios, folder):
        assert [len(answer.tokens) for answer in result.answers[0]] == [16] * 4
        assert result.layer_tokens["sparse"] > 2 * 3000
        assert 0 < result.tiles["computed"] < 0.9 * result.tiles["causal"]
