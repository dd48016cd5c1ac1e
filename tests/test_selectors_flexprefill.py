"""FlexPrefill against a transcription of its rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from _attention import QKV
from _rules import (
    SCALE,
    SHAPES,
    SIZES,
    Array,
    Case,
    Tiles,
    case,
    chunk,
    contains,
    found,
    looking,
    of_blocks,
    owed,
    row_blocks,
    softmax,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.flexprefill import FlexPrefill

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}
CLOSE = 1e-4


def divergence(p: Array, q: Array) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        for x in (a, b):
            total += x * math.log(2 * x / (a + b)) / 2 if x > 0 else 0.0
    return math.sqrt(max(total, 0.0))


def probed(policy: FlexPrefill, it: Case) -> tuple[Array, Array, float]:
    """Mean mass by column and by distance, and how far the pooled estimate is from the former."""
    size, count = policy.block, (it.seq_len - 1) // policy.block + 1
    rows = range(max(it.offset, it.seq_len - size), it.seq_len)
    columns, distances = np.zeros(it.seq_len), np.zeros(it.seq_len)
    for row in rows:
        for key, weight in enumerate(softmax(it.k[: row + 1] @ it.row(row) * SCALE)):
            columns[key] += weight / len(rows)
            distances[row - key] += weight / len(rows)
    mean = np.mean([it.row(row) for row in rows], axis=0)
    means = [it.k[j * size : (j + 1) * size].mean(0) for j in range(count)]
    true = np.array([columns[j * size : (j + 1) * size].sum() for j in range(count)])
    return columns, distances, divergence(softmax(np.array(means) @ mean * SCALE), true)


def rule(policy: FlexPrefill, it: Case, gamma: float) -> Tiles:
    size, count = policy.block, (it.seq_len - 1) // policy.block + 1
    columns, distances, apart = probed(policy, it)
    aware, least = apart < policy.distance, min(count, math.ceil(policy.min_budget / size))
    lines = []
    for mass in (columns, distances):
        tokens, total = 1, 0.0
        for weight in sorted(mass, reverse=True):
            total += weight
            tokens += total <= gamma
        number = least if aware else min(count, max(least, tokens // size + 1))
        sums = [mass[j * size : (j + 1) * size].sum() for j in range(count)]
        sums[0] = math.inf
        lines.append(sorted(range(count), key=lambda j: -sums[j])[:number])
    kept = {i: {*lines[0], *(i - d for d in lines[1] if d <= i)} for i in row_blocks(it, size)}
    if aware:
        entries = []
        for i in kept:
            rows = np.mean([it.row(p) for p in it.present(i * size, i * size + size)], axis=0)
            seen = range(min(i + 1, count))
            means = [it.k[j * size : (j + 1) * size].mean(0) for j in seen]
            weights = softmax(np.array(means) @ rows * SCALE)
            entries += [(float(weight), i, j) for j, weight in enumerate(weights)]
        total = 0.0
        for weight, i, j in sorted(entries, reverse=True):
            total += weight
            if total <= gamma * len(kept):
                kept[i].add(j)
    return owed(policy, it, of_blocks(it, size, kept, size))


def assert_the_rule(policy: FlexPrefill, seed: int, size: tuple[int, int]) -> set[bool]:
    """Which kinds of heads there were: query-aware or not."""
    qkv, kinds = step(seed, *size), set()
    for head, tiles in enumerate(found(policy, qkv)):
        it = case(qkv, head)
        apart = probed(policy, it)[2]
        if policy.distance and abs(apart - policy.distance) < CLOSE:
            continue  # either will do
        assert contains(tiles, rule(policy, it, policy.gamma - CLOSE))
        assert contains(rule(policy, it, policy.gamma + CLOSE), tiles)
        kinds.add(apart < policy.distance)
    return kinds


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("block", [64, 128])
def test_the_tiles_are_the_rules(size: tuple[int, int], block: Any) -> None:
    for distance, budget in ((0.0, 1), (1.0, 1), (0.0, 200), (1.0, 200)):
        policy = FlexPrefill(gamma=0.7, distance=distance, min_budget=budget, block=block, **WINDOW)
        kinds = assert_the_rule(policy, sum(size), size)
        assert kinds == {distance > 0}


@settings(deadline=None, max_examples=15)
@given(
    size=SIZES,
    seed=st.integers(0, 1000),
    more=st.fixed_dictionaries(
        {
            "gamma": st.floats(0.05, 0.95),
            "distance": st.floats(0.0, 0.6),
            "min_budget": st.integers(1, 500),
            "block": st.sampled_from([64, 128]),
            "tile": st.sampled_from([16, 32, 64]),
            "sink": st.integers(1, 100),
            "local": st.integers(0, 200),
        }
    ),
)
def test_of_any_step(size: tuple[int, int], seed: int, more: dict[str, Any]) -> None:
    assert_the_rule(FlexPrefill(**more), seed, size)


def test_each_head_has_the_kind_its_last_rows_say() -> None:
    """Of keys that are their blocks' means a mean says all; of one that sticks out it does not."""
    q, k, v = step(3, 512, 1024)
    k[:] = k[::128].repeat_interleave(128, 0)
    q[384:] = q[384]
    q *= 0.2  # less of a contrast

    def tiles(qkv: QKV, distance: float) -> Tiles:
        policy = FlexPrefill(gamma=0.9, min_budget=1, distance=distance, **WINDOW)
        return found(policy, qkv)[0]

    even, uneven = (q, k, v), looking((q, k, v), 200, slice(384, 512))
    assert tiles(even, 0.1) == tiles(even, 1.0) != tiles(even, 0.0)
    assert tiles(uneven, 0.1) == tiles(uneven, 0.0) != tiles(uneven, 1.0)


def test_each_chunk_is_judged_by_its_own_last_rows() -> None:
    qkv = looking(step(5, 1024, 1024), 200, slice(384, 512))
    policy = FlexPrefill(gamma=0.5, min_budget=256, distance=0.0, **WINDOW)
    asked = found(policy, chunk(qkv, 256, 512))[0]
    assert all(200 // 16 in tiles for tiles in asked)
    other = found(policy, chunk(qkv, 768, 1024))[0]
    assert all(200 // 16 not in tiles for tiles in other)


def test_the_budget_is_a_floor() -> None:
    qkv = step(5, 512, 2048)
    for gamma in (0.0, 0.3):
        policy = FlexPrefill(gamma=gamma, min_budget=1024, distance=0.0, **WINDOW)
        for tiles in found(policy, qkv)[0]:
            assert len(tiles) >= 1024 // 16
    everything = found(FlexPrefill(gamma=0.0, min_budget=2048), qkv)[0]
    assert [len(tiles) for tiles in everything] == [4 * n for n in range(25, 33)]


def test_nothing_but_the_last_rows_is_looked_at_by_vertical_slash() -> None:
    q, k, v = step(11, 300, 600)
    policy = FlexPrefill(gamma=0.5, distance=0.0, min_budget=1)
    tiles = found(policy, (q, k, v))
    q[:172] = torch.nan
    assert found(policy, (q, k, v)) == tiles


def test_it_is_a_policy() -> None:
    policy = parse_policy({"selector": "flexprefill"})
    assert policy == FlexPrefill(gamma=0.95, distance=0.1, min_budget=1024, block=128)
    assert FlexPrefill(gamma=0.9).scaled(2).gamma == pytest.approx(0.8)
    assert FlexPrefill(gamma=0.4).scaled(0).gamma == 1
    for wrong in ({"gamma": 1.1}, {"distance": -0.1}, {"block": 32}, {"min_budget": 0}):
        with pytest.raises(ValueError, match="flexprefill"):
            parse_policy({"selector": "flexprefill", **wrong})
