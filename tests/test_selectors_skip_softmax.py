"""Skip-softmax against a transcription of its rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from _rules import SCALE, SHAPES, SIZES, Case, Tiles, case, contains, found, in_chunks, owed, step
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.skip_softmax import SkipSoftmax

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def rule(policy: SkipSoftmax, it: Case, limit: float) -> Tiles:
    """Tile by tile as a kernel goes, with every row's running maximum."""
    keys = []
    for _, first, end in it.q_blocks():
        wanted: set[int] = set()
        for row in range(first, end):
            scores, running = it.k[: row + 1] @ it.row(row) * SCALE, -np.inf
            for at in range(0, row + 1, policy.tile):
                best = scores[at : at + policy.tile].max()
                running = max(running, best)
                if not best - running < limit:
                    wanted.add(at)
        keys.append(wanted)
    return owed(policy, it, keys)


def assert_the_rule(policy: SkipSoftmax, seed: int, size: tuple[int, int], prompt_len: int) -> None:
    qkv = step(seed, *size)
    lam = policy.threshold
    if lam is None:
        lam = min(1.0, policy.a * math.exp(policy.b * policy.sparsity) / prompt_len)
    limit = math.log(lam) if lam else -math.inf
    for head, tiles in enumerate(found(policy, qkv, prompt_len)):
        it = case(qkv, head, prompt_len)
        # Of a lambda of 1 both sides are exact: a tile is lower than another or it is not.
        assert contains(tiles, rule(policy, it, limit + 1e-4))
        assert contains(rule(policy, it, limit - 1e-4), tiles)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_the_tiles_are_the_rules(size: tuple[int, int], tile: Any) -> None:
    for threshold in (0.5, 0.05):
        policy = SkipSoftmax(threshold=threshold, tile=tile, **WINDOW)
        assert_the_rule(policy, sum(size), size, size[1])
    assert_the_rule(SkipSoftmax(a=20.0, b=3.0, tile=tile, **WINDOW), 3, size, size[1] + 500)


@settings(deadline=None, max_examples=15)
@given(
    size=SIZES,
    seed=st.integers(0, 1000),
    more=st.fixed_dictionaries(
        {
            "threshold": st.floats(0.001, 0.99),
            "tile": st.sampled_from([16, 32, 64]),
            "sink": st.integers(1, 100),
            "local": st.integers(0, 200),
        }
    ),
)
def test_of_any_step(size: tuple[int, int], seed: int, more: dict[str, Any]) -> None:
    assert_the_rule(SkipSoftmax(**more), seed, size, size[1])


def test_lambda() -> None:
    policy = SkipSoftmax(a=100.0, b=5.0, sparsity=0.5)
    assert policy.limit(16384) == pytest.approx(math.log(100 * math.exp(2.5) / 16384))
    assert policy.limit(1000) == 0.0
    assert SkipSoftmax(a=0.0).limit(1000) == SkipSoftmax(threshold=0.0).limit(1) == -math.inf
    assert SkipSoftmax(threshold=0.01).limit(1) == math.log(0.01)
    assert SkipSoftmax(threshold=0.01).scaled(3).limit(1) == pytest.approx(math.log(0.03))
    assert policy.scaled(3).limit(16384) == pytest.approx(policy.limit(16384) + math.log(3))


def test_a_whole_prompt_and_its_chunks_keep_the_same() -> None:
    qkv, policy = step(5, 1500, 1500), SkipSoftmax(a=20.0, **WINDOW)
    whole = found(policy, qkv)
    for size in (64, 320, 512):
        assert in_chunks(policy, qkv, size) == whole


def test_it_is_a_policy() -> None:
    policy = parse_policy({"selector": "skip_softmax"})
    assert policy == SkipSoftmax(a=100.0, b=5.0, sparsity=0.5, threshold=None)
    assert parse_policy(SkipSoftmax(threshold=0.1).model_dump()) == SkipSoftmax(threshold=0.1)
    for wrong in (
        {"threshold": 1.1},
        {"sparsity": 2.0},
        {"threshold": 0.1, "sparsity": 0.3},
        {"threshold": 0.1, "a": 1.0},
    ):
        with pytest.raises(ValueError, match="skip_softmax"):
            parse_policy({"selector": "skip_softmax", **wrong})
