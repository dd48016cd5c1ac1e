"""FlashPrefill's thresholding against a transcription of its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _rules import (
    SCALE,
    SHAPES,
    SIZES,
    Case,
    Tiles,
    case,
    contains,
    found,
    in_chunks,
    of_blocks,
    owed,
    row_blocks,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.flashprefill import FlashPrefill

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def rule(policy: FlashPrefill, it: Case, alpha: float) -> Tiles:
    """Every row against every mean, one after the other."""
    size, kept = policy.block, {}
    for block in row_blocks(it, size):
        scores: dict[int, list[float]] = {}
        for row in it.present(block * size, block * size + size):
            for j in range(it.seq_len // size):
                if (j + 1) * size - 1 <= row:  # all of it lies before the row
                    mean = np.mean([it.k[p] for p in range(j * size, j * size + size)], axis=0)
                    scores.setdefault(j, []).append(float(it.row(row) @ mean) * SCALE)
        highest = max((max(column) for column in scores.values()), default=0.0)
        sums = {j: sum(np.exp(s - highest) for s in column) for j, column in scores.items()}
        best = max(sums.values(), default=0.0)
        kept[block] = {j for j, score in sums.items() if score >= alpha * best}
        if block >= (it.prompt_len + size - 1) // size - policy.last:
            kept[block] = set(range(block + 1))
    return owed(policy, it, of_blocks(it, size, kept, size))


def assert_the_rule(
    policy: FlashPrefill, seed: int, size: tuple[int, int], prompt_len: int
) -> None:
    qkv = step(seed, *size)
    for head, tiles in enumerate(found(policy, qkv, prompt_len)):
        it = case(qkv, head, prompt_len)
        assert contains(tiles, rule(policy, it, policy.alpha * 1.0001))
        assert contains(rule(policy, it, policy.alpha / 1.0001), tiles)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("more", [0, 100, 1000])
def test_the_tiles_are_the_rules(size: tuple[int, int], block: Any, more: int) -> None:
    policy = FlashPrefill(alpha=0.4, block=block, **WINDOW)
    assert_the_rule(policy, sum(size), size, size[1] + more)


@settings(deadline=None, max_examples=20)
@given(
    size=SIZES,
    seed=st.integers(0, 1000),
    after=st.integers(0, 500),
    more=st.fixed_dictionaries(
        {
            "alpha": st.floats(0.01, 1.0),
            "last": st.integers(0, 4),
            "block": st.sampled_from([64, 128]),
            "tile": st.sampled_from([16, 32, 64]),
            "sink": st.integers(1, 100),
            "local": st.integers(0, 200),
        }
    ),
)
def test_of_any_step(size: tuple[int, int], seed: int, after: int, more: dict[str, Any]) -> None:
    assert_the_rule(FlashPrefill(**more), seed, size, size[1] + after)


def test_a_whole_prompt_and_its_chunks_keep_the_same() -> None:
    qkv, policy = step(5, 1100, 1100), FlashPrefill(alpha=0.5, **WINDOW)
    whole = found(policy, qkv)
    assert in_chunks(policy, qkv, 256) == whole


def test_the_last_rows_are_the_prompts() -> None:
    qkv, policy = step(7, 512, 1024), FlashPrefill(alpha=1.0, **WINDOW)
    ended = found(policy, qkv, 1024)[0]
    assert [len(tiles) for tiles in ended[-4:]] == [52, 56, 60, 64]
    assert all(len(tiles) < 40 for tiles in ended[:-4])
    going_on = found(policy, qkv, 2000)[0]
    assert all(len(tiles) < 40 for tiles in going_on)
    assert going_on[:-4] == ended[:-4]
    # 1200 tokens are ten blocks of rows, of which the last two begin at 1024.
    assert found(policy, qkv, 1200)[0] == going_on
    assert [len(tiles) for tiles in found(policy, qkv, 1100)[0][-2:]] == [60, 64]


def test_the_first_two_and_the_last_four_blocks_are_in() -> None:
    policy = FlashPrefill(alpha=1.0, last=0)
    for (number, _, _), tiles in zip(
        case(qkv := step(8, 1280, 1280), 0).q_blocks(), found(policy, qkv)[0], strict=True
    ):
        pair = number // 2
        wanted = {*range(2), *range(max(0, pair - 3), pair + 1)}
        assert tiles >= {t for t in range(4 * number + 4) if t * 16 // 128 in wanted}


def test_it_is_a_policy() -> None:
    policy = parse_policy({"selector": "flashprefill"})
    assert policy == FlashPrefill(alpha=0.18, last=2, block=128, sink=256, local=448)
    assert FlashPrefill(alpha=0.2).scaled(2).alpha == 0.4
    assert FlashPrefill(alpha=0.6).scaled(2).alpha == 1
    for wrong in ({"alpha": 1.1}, {"alpha": -1.0}, {"block": 32}, {"last": -1}):
        with pytest.raises(ValueError, match="flashprefill"):
            parse_policy({"selector": "flashprefill", **wrong})
