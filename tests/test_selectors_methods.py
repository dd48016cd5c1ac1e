"""What the published methods owe as selectors, one test for all of them, and an engine that serves
each in a head of its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import make_paged, make_qkv, needs_core
from _rules import Tiles, contains, found, poisoned, step, view_of
from _selectors import assert_served, forget, most_memory

from vllm_sparse_backend.ops import select_tiles
from vllm_sparse_backend.selection import ListSelector, coarse, parse_policy, registry
from vllm_sparse_backend.selection.kept import kept_tiles

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}
# For what keeps everything of the short contexts here at its default.
FEW: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.6, "min_budget": 128},
    "vertical_slash": {"columns": 60, "diagonals": 150},
    "block_topk": {"blocks": 5},
    "xattention": {"tau": 0.5},
    "sparge": {"tau": 0.5, "alike": -1.0},
    "flashprefill": {"alpha": 0.5, "last": 0},
    "skip_softmax": {"threshold": 0.5},
}
# The setting that leaves nothing out, of those that have one.
EVERYTHING: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 1.0},
    "xattention": {"tau": 1.0},
    "sparge": {"tau": 1.0},
    "flashprefill": {"alpha": 0.0},
    "skip_softmax": {"threshold": 0.0},
}
named = pytest.mark.parametrize("name", FEW)


def policy(name: str, **more: Any) -> ListSelector:
    made = parse_policy({"selector": name, **FEW[name], **WINDOW, **more})
    assert isinstance(made, ListSelector)
    return made


def everything(rows: int, seq_len: int) -> Tiles:
    edges = [*range((seq_len - rows) // 64 * 64 + 64, seq_len, 64), seq_len]
    return [set(range(-(-end // 16))) for end in edges]


@named
def test_a_ladder_goes_from_most_to_least(name: str) -> None:
    ladder = type(policy(name)).ladder()
    assert 5 <= len(ladder) <= 8
    assert len(set(ladder)) == len(ladder)
    # Blocks that are alike, and less of a contrast than between white noise.
    g = torch.Generator().manual_seed(1)
    rows, keys = (torch.randn(n, 1, 64, generator=g).repeat_interleave(128, 0) for n in (2, 32))
    q = rows + 0.3 * torch.randn(256, 2, 64, generator=g)
    k = keys + 0.3 * torch.randn(4096, 1, 64, generator=g)
    qkv = q.bfloat16(), k.bfloat16(), k.bfloat16()
    every = [found(it.model_copy(update=WINDOW), qkv, 5000) for it in ladder]
    for more, less in itertools.pairwise(every):
        for head in range(2):
            assert contains(more[head], less[head])
    assert every[0] != every[-1]
    assert parse_policy({"selector": name}) in ladder


@pytest.mark.parametrize("name", EVERYTHING)
def test_nothing_is_left_out_at_one_end(name: str) -> None:
    for size in ((1, 1), (70, 300), (500, 1203)):
        assert found(policy(name, **EVERYTHING[name]), step(2, *size)) == [everything(*size)] * 2


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_threshold_scale_scales(name: str) -> None:
    mine, qkv = policy(name), step(3, 300, 1500)
    kept = {}
    for factor in (0.0, 0.5, 1.0, 1.5):
        other = mine.scaled(factor)
        assert other is not None
        kept[factor] = found(other, qkv)
    assert kept[0.0] == [everything(300, 1500)] * 2
    for head in range(2):
        assert contains(kept[0.5][head], kept[1.0][head])
        assert contains(kept[1.0][head], kept[1.5][head])
    assert kept[1.0] == found(mine, qkv)
    assert kept[0.5] != kept[1.5]


@named
def test_what_cannot_be_judged_is_kept(name: str) -> None:
    qkv = step(4, 320, 1344)
    plain = found(policy(name), qkv)
    assert all(len(tiles) < 70 for tiles in plain[0])
    # A key: in its tile for whatever sees it.
    for head in found(policy(name), poisoned(qkv, key=500)):
        assert all(500 // 16 in tiles for tiles in head)
    # A row: everything for its q block. The last one is looked at by all methods.
    for head in found(policy(name), poisoned(qkv, row=1343)):
        assert head[-1] == everything(320, 1344)[-1]


@named
def test_a_heads_tiles_depend_on_no_other_head(name: str) -> None:
    q, k, v = step(5, 300, 1200, heads=3)
    together = found(policy(name), (q, k, v))
    for head in range(3):
        assert found(policy(name), (q[:, head : head + 1], k, v)) == [together[head]]


@named
def test_long_views_are_chosen_for_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = step(6, 900, 1100)
    whole = found(policy(name), qkv, 1200)
    monkeypatch.setattr(coarse, "ROWS_AT_ONCE", 256)
    assert found(policy(name), qkv, 1200) == whole


@named
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_of_any_dtype_and_scale(name: str, dtype: torch.dtype) -> None:
    """Products of numbers that all three hold are the same, and so is what is kept."""
    qkv = step(7, 200, 1000)
    plain = kept_tiles(policy(name), view_of(qkv))
    q, k, v = (x.to(dtype) for x in qkv)
    assert torch.equal(kept_tiles(policy(name), view_of((q, k, v))), plain)
    assert torch.equal(kept_tiles(policy(name), view_of((q * 2, k / 2, v))), plain)


@needs_core
@named
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_kernels_get_what_the_rule_keeps(name: str, tile: Any) -> None:
    batch = [make_qkv(r, *size) for r, size in enumerate([(100, 463), (65, 400), (320, 1200)])]
    paged = make_paged(batch)
    policies = [policy(name, tile=tile)] * 4
    for request in range(3):
        own, other = (
            select_tiles(*paged.tensors, policies, request=request, impl=impl)
            for impl in ("cpu", "reference")
        )
        assert torch.equal(own.indptr, other.indptr)
        assert torch.equal(own.tiles, other.tiles)
    assert sum(own.computed) < sum(own.causal)


def test_all_are_known() -> None:
    forget()
    assert set(FEW) <= set(registry.BUILT_IN)


@named
def test_memory_is_bounded(name: str) -> None:
    """At 128K tokens, head_dim 64, three heads: 256 MB beside queries, keys and values."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2048, 3, 64, generator=g).bfloat16()
    k, v = torch.randn(2, 131072, 1, 64, generator=g).bfloat16()
    its = parse_policy({"selector": name})
    assert isinstance(its, ListSelector)
    assert 0 < most_memory(its, view_of((q, k, v))) < 256 << 20


# In an engine

POLICIES: list[list[dict[str, Any]]] = [
    [
        {"selector": "flexprefill", "gamma": 0.7, "min_budget": 128},
        {"selector": "vertical_slash", "columns": 100, "diagonals": 200},
        {"selector": "block_topk", "blocks": 8},
        {"selector": "xattention", "tau": 0.7, "stride": 16, "tile": 32},
    ],
    [
        {"selector": "sparge", "tau": 0.7, "alike": 0.0},
        {"selector": "flashprefill", "alpha": 0.5, "sink": 64, "local": 64},
        {"selector": "skip_softmax", "threshold": 0.5, "tile": 64},
        {"selector": "flexprefill", "distance": 0.0, "gamma": 0.5, "block": 64, "min_budget": 64},
    ],
]


@needs_core
def test_an_engine_serves_each_in_a_head_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    assert_served(tiny_llama, POLICIES, tmp_path)
