"""What these methods owe as selectors whatever their rule, and an engine that serves all of them,
each in a head of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import needs_core
from _rules import found, step, view_of
from _selectors import assert_served, most_memory

from vllm_sparse_backend.fit_gates.fit import untaught
from vllm_sparse_backend.selection import ListSelector, gates, parse_policy, registry
from vllm_sparse_backend.selection.gates import Rotation
from vllm_sparse_backend.selection.kept import kept_tiles

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}
# For what keeps everything of the short contexts here at its default.
FEW: dict[str, dict[str, Any]] = {
    "anchor": {"theta": 2.0, "superblock": 1},
    "hip": {"k": 128, "k_second": 256, "k_first": 512, "dense_layers": 0},
    "hyper": {"exact": 128, "block": 64, "samples": 64},
    "longheads": {"chunk": 64, "budget": 256},
    "neighborhood": {"window": 300, "stride": 100},
    "seer": {"threshold": 0.08},
}
named = pytest.mark.parametrize("name", FEW)


@pytest.fixture(scope="module")
def gates_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Gates that compare means, of two layers with four heads."""
    path = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    its = untaught(4, 64, Rotation(10000.0 ** -(torch.arange(32) / 32)))
    gates.save(path, {0: its, 1: its}, {})
    return str(path)


def policy(name: str, gates_file: str, few: bool = True) -> ListSelector:
    more = {**FEW[name], **WINDOW} if few else {}
    if name == "seer":
        more["gates"] = gates_file
    made = parse_policy({"selector": name, **more})
    assert isinstance(made, ListSelector)
    return made


def test_all_are_known() -> None:
    assert set(FEW) <= set(registry.BUILT_IN)


@named
def test_a_heads_tiles_depend_on_no_other_head(name: str, gates_file: str) -> None:
    its, (q, k, v) = policy(name, gates_file), step(5, 300, 1200, heads=4)
    together = found(its, (q, k, v))
    view = view_of((q, k, v))
    for head in range(4):
        alone = type(view)(
            q=view.q[head : head + 1],
            seq_len=view.seq_len,
            tile=its.tile,
            scale=view.scale,
            prompt_len=view.prompt_len,
            heads=(head,),
            num_heads=4,
            layer=0,
            read=view.read,
        )
        (kept,) = kept_tiles(its, alone)
        assert [set(row.nonzero().flatten().tolist()) for row in kept] == together[head]


@named
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_of_any_dtype(name: str, dtype: torch.dtype, gates_file: str) -> None:
    """Products of numbers that all three hold are the same, and so is what is kept."""
    qkv = step(7, 200, 1000, heads=4)
    plain = kept_tiles(policy(name, gates_file), view_of(qkv))
    q, k, v = (x.to(dtype) for x in qkv)
    assert torch.equal(kept_tiles(policy(name, gates_file), view_of((q, k, v))), plain)
    assert int(plain.sum()) < 0.9 * int(view_of(qkv).causal.sum()) * 4


@pytest.mark.all
@named
def test_memory_is_bounded(name: str, gates_file: str) -> None:
    """At 128K tokens, head_dim 64, three heads: 256 MB beside queries, keys and values."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2048, 4, 64, generator=g).bfloat16()[:, :3]
    k, v = torch.randn(2, 131072, 1, 64, generator=g).bfloat16()
    its = policy(name, gates_file, few=False)
    if name == "hip":
        its = its.model_copy(update={"dense_layers": 0})
    view = view_of((q, k, v))
    four = type(view)(
        q=view.q,
        seq_len=view.seq_len,
        tile=its.tile,
        scale=view.scale,
        prompt_len=view.prompt_len,
        heads=view.heads,
        num_heads=4,
        layer=0,
        read=view.read,
    )
    assert 0 < most_memory(its, four) < 256 << 20


# In an engine


@needs_core
def test_an_engine_serves_each_in_a_head_of_its_own(
    tiny_llama: Path, tmp_path: Path, gates_file: str
) -> None:
    layers: list[list[dict[str, Any]]] = [
        [
            {"selector": "anchor", "theta": 3.0, "superblock": 2, "sink": 64},
            {"selector": "hip", **FEW["hip"], "sink": 64, "local": 128},
            {"selector": "hyper", **FEW["hyper"], "tile": 32},
            {"selector": "longheads", "budget": 512, "chunk": 128},
        ],
        [
            {"selector": "neighborhood", "window": 512, "stride": 128},
            {"selector": "seer", "threshold": 0.05, "gates": gates_file, "tile": 64},
            {"selector": "sale", "sink": 32, "tile": 32, "bits": 4, "row_stride": 1, "tail": 0,
             "tau": 0.008},
            {"selector": "static", "local": 64, "growth": 0.25},
        ],
    ]  # fmt: skip
    assert_served(tiny_llama, layers, tmp_path)
