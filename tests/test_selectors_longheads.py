"""LongHeads' choice of chunks against a transcription of its rule."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from _rules import (
    SHAPES,
    Case,
    Tiles,
    case,
    contains,
    found,
    in_chunks,
    looking,
    owed,
    poisoned,
    step,
)

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.longheads import LongHeads

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def rule(policy: LongHeads, it: Case) -> Tiles:
    """First chunk, own and that before it; then by representative, until the budget is spent."""
    size, wanted = policy.chunk, []
    for number, first, end in it.q_blocks():
        q = np.mean([it.row(p) for p in range(first, end)], axis=0)
        own = 64 * number // size
        chosen = {0, own, max(0, own - 1)}
        scores = {}
        for chunk in range(own):
            scores[chunk] = q @ it.k[chunk * size : (chunk + 1) * size].mean(0)
        for chunk in sorted(scores, key=lambda c: -scores[c]):
            if len(chosen) < policy.budget // size:
                chosen.add(chunk)
        wanted.append([p for c in chosen for p in range(c * size, (c + 1) * size)])
    return owed(policy, it, wanted)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("chunk", "budget"), [(64, 400), (128, 512), (256, 100), (256, 1024)])
@pytest.mark.parametrize("tile", [16, 64])
def test_the_tiles_are_the_rules(size: tuple[int, int], chunk: int, budget: int, tile: Any) -> None:
    for more in (WINDOW, {"sink": 70, "local": 100, "growth": 0.1}):
        policy = LongHeads(chunk=chunk, budget=budget, tile=tile, **more)
        qkv = step(sum(size), *size)
        for head, tiles in enumerate(found(policy, qkv)):
            assert tiles == rule(policy, case(qkv, head))


@pytest.mark.parametrize("size", [64, 192, 256])
def test_chunks_of_a_prompt_keep_what_the_whole_one_does(size: int) -> None:
    qkv, policy = step(5, 1500, 1500), LongHeads(chunk=128, budget=640, **WINDOW)
    assert in_chunks(policy, qkv, size) == found(policy, qkv)


def test_it_finds_a_chunk_that_is_looked_at() -> None:
    policy = LongHeads(chunk=64, budget=256, **WINDOW)
    q, k, v = step(6, 64, 1472)
    for key in (300, 700, 1100):
        near = looking((q / 16, k, v), key, slice(0, 64))
        near[1][key // 64 * 64 :][:64, 0, -1] = 20
        assert key // 16 in found(policy, near)[0][0]


def test_a_larger_budget_keeps_more() -> None:
    qkv = step(7, 500, 1472)
    budgets = (2048, 1472, 1024, 768, 512, 256, 64)
    every = [found(LongHeads(chunk=64, budget=budget, **WINDOW), qkv) for budget in budgets]
    for more, less in itertools.pairwise(every):
        assert contains(more[0], less[0]) and contains(more[1], less[1])
    whole = [-(-end // 16) for _, _, end in case(qkv, 0).q_blocks()]
    assert [len(tiles) for tiles in every[0][0]] == whole, "a budget of the context is dense"
    assert [len(tiles) for tiles in every[-1][0]] < whole


def test_what_cannot_be_judged_is_kept() -> None:
    policy, qkv = LongHeads(chunk=64, budget=192, **WINDOW), step(4, 320, 1344)
    for head in found(policy, poisoned(qkv, key=500)):
        assert all(500 // 16 in tiles for tiles in head)
    for head in found(policy, poisoned(qkv, row=1343)):
        assert len(head[-1]) == 84


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "longheads"}) == LongHeads(budget=4096, chunk=256)
    assert LongHeads().scaled(2) is None
    assert LongHeads() in LongHeads.ladder()
    for wrong in ({"chunk": 100}, {"budget": 0}, {"chunks": 3}):
        with pytest.raises(ValueError, match="longheads"):
            parse_policy({"selector": "longheads", **wrong})
