"""HiP attention's three stages against a transcription of their rule."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from _rules import (
    SCALE,
    SHAPES,
    Array,
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
    view_of,
)

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.hip import HiP
from vllm_sparse_backend.selection.kept import kept_tiles

FEW: dict[str, Any] = {"k": 128, "k_second": 256, "k_first": 512, "dense_layers": 0}
WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def best_of(queries: list[Array], keys: Array, begin: int, end: int, limit: int) -> float:
    """Halve a chunk down to one key, always to the half whose middle key scores higher; the best
    score on the way."""

    def score(key: int) -> float:
        return max(SCALE * q @ keys[min(key, limit - 1)] for q in queries)

    best = -np.inf
    while end - begin > 1:
        centre = (begin + end) // 2
        left, right = score((begin + centre) // 2), score((centre + end) // 2)
        best = max(best, left, right)
        if right > left:
            begin = centre
        else:
            end = centre
    return best


def rule(policy: HiP, it: Case) -> Tiles:
    """Chunks of 256, of those chunks of 32, of those tiles; each time the best within a budget."""
    wanted = []
    for number, first, end in it.q_blocks():
        rows = [it.row(p) for p in range(first, end)]
        groups = [it.present(p, p + 4) for p in range(64 * number, 64 * number + 64, 4)]
        means = [np.mean([it.row(p) for p in group], axis=0) for group in groups if group]
        window = policy.local + int(policy.growth_units * (64 * number + 64)) // 65536
        limit = max(0, 64 * number - window)
        sizes = (256, max(32, policy.tile), policy.tile)
        budgets = (policy.k_first, policy.k_second, policy.k)
        chunks = list(range(0, limit, 256))
        for stage, (size, budget) in enumerate(zip(sizes, budgets, strict=True)):
            if stage:
                chunks = [p for c in chunks for p in range(c, c + sizes[stage - 1], size)]
            chunks = [c for c in chunks if c < limit and c + size > policy.sink]
            queries = rows if stage == 2 else means
            scores = {c: best_of(queries, it.k, c, c + size, limit) for c in chunks}
            chunks = sorted(chunks, key=lambda c: -scores[c])[: budget // size]
            chunks.sort()
        wanted.append([p for c in chunks for p in range(c, c + policy.tile)])
    return owed(policy, it, wanted)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize(
    "more", [WINDOW, {"sink": 256, "local": 100, "growth": 0.1}, {"sink": 300, "local": 256}]
)
def test_the_tiles_are_the_rules(size: tuple[int, int], tile: Any, more: dict[str, Any]) -> None:
    policy, qkv = HiP(tile=tile, **FEW, **more), step(sum(size), *size)
    for head, tiles in enumerate(found(policy, qkv)):
        assert tiles == rule(policy, case(qkv, head))


@pytest.mark.parametrize("k", [64, 200, 256])
def test_stages_may_keep_anything(k: int) -> None:
    """A stage without effect, budgets that are no multiples."""
    qkv = step(9, 300, 1472)
    for second, first in ((256, 300), (500, 2000), (2000, 2000)):
        policy = HiP(k=k, k_second=second, k_first=first, dense_layers=0, **WINDOW)
        for head, tiles in enumerate(found(policy, qkv)):
            assert tiles == rule(policy, case(qkv, head))


@pytest.mark.parametrize("size", [64, 192, 256])
def test_chunks_of_a_prompt_keep_what_the_whole_one_does(size: int) -> None:
    qkv, policy = step(5, 1500, 1500), HiP(**FEW, **WINDOW)
    assert in_chunks(policy, qkv, size) == found(policy, qkv)


def test_it_finds_a_key_that_is_looked_at() -> None:
    """Where its chunks stand out as well, which is what halving goes by."""
    policy = HiP(**FEW, **WINDOW)
    q, k, v = step(6, 64, 1472)
    for key in (300, 555, 801, 1100):
        near = looking((q / 16, k, v), key, slice(0, 64))
        for size, strength in ((256, 10), (32, 14), (16, 18), (1, 20)):
            begin = key // size * size
            near[1][begin : begin + size, 0, -1] = strength
        assert key // 16 in found(policy, near)[0][0]


def test_a_larger_k_keeps_more() -> None:
    qkv = step(7, 500, 1472)
    ks = (512, 384, 256, 128, 64)
    every = [found(HiP(**{**FEW, "k_second": 512, "k": k}, **WINDOW), qkv) for k in ks]
    for more, less in itertools.pairwise(every):
        assert contains(more[0], less[0]) and contains(more[1], less[1])
    assert every[0] != every[-1]


def test_budgets_of_the_context_are_dense() -> None:
    qkv = step(8, 500, 1203)
    policy = HiP(k=2048, dense_layers=0, **WINDOW)
    whole = [-(-end // 16) for _, _, end in case(qkv, 0).q_blocks()]
    assert [len(tiles) for tiles in found(policy, qkv)[0]] == whole


def test_the_first_layers_are_dense() -> None:
    view = view_of(step(8, 300, 1203))  # of layer 0
    for layers, dense in ((0, False), (1, True)):
        policy = HiP(**{**FEW, "dense_layers": layers}, **WINDOW)
        kept = kept_tiles(policy, view)
        assert bool((kept == view.causal).all()) is dense


def test_what_cannot_be_judged_is_kept() -> None:
    policy, qkv = HiP(**FEW, **WINDOW), step(4, 320, 1344)
    for key in (2 * 256 + 64, 2 * 256 + 192):  # where every halving of that chunk begins
        heads = found(policy, poisoned(qkv, key=key))
        for head in heads:
            assert all(key // 16 in tiles for tiles in head)
    for head in found(policy, poisoned(qkv, row=1343)):
        assert len(head[-1]) == 84


def test_it_is_a_policy() -> None:
    whole = HiP(k=2048, k_second=8192, k_first=32768, sink=256, local=1024, dense_layers=3)
    assert parse_policy({"selector": "hip"}) == whole
    assert HiP().scaled(2) is None
    assert HiP() in HiP.ladder()
    with pytest.raises(ValueError, match="k <= k_second <= k_first, got 9000, 8192, 32768"):
        parse_policy({"selector": "hip", "k": 9000})
    for wrong in ({"k": 0}, {"k": 2.5}, {"chunks": 3}):
        with pytest.raises(ValueError, match="hip"):
            parse_policy({"selector": "hip", **wrong})
