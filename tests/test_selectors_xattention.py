"""XAttention against a transcription of its rule."""

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
    softmax,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.xattention import XAttention

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}
CLOSE = 1e-4  # shares of the mass that fp32 may take for equal


def rule(policy: XAttention, it: Case, tau: float) -> Tiles:
    """Antidiagonals, softmax, sums of blocks, the smallest set: one number after the other."""
    s, size = policy.stride, policy.block
    kept = {}
    for block in row_blocks(it, size):
        mass = np.zeros((it.seq_len - 1) // size + 1)
        for i in range(block * size // s, (block + 1) * size // s):
            if not it.present(i * s, i * s + s):
                continue
            rows = np.concatenate([it.row(i * s + s - 1 - t) for t in range(s)])
            scores = [
                rows @ np.concatenate([it.key(j * s + t) for t in range(s)]) * SCALE / s
                for j in range(i + 1)
                if j * s < it.seq_len
            ]
            for j, weight in enumerate(softmax(np.array(scores))):
                mass[j * s // size] += weight
        chosen = {0, block}
        for j in sorted(range(len(mass)), key=lambda j: -mass[j]):
            if sum(mass[c] for c in chosen) >= tau * mass.sum():
                break
            chosen.add(j)
        kept[block] = chosen
    return owed(policy, it, of_blocks(it, size, kept, size))


def assert_the_rule(policy: XAttention, seed: int, size: tuple[int, int]) -> None:
    qkv = step(seed, *size)
    for head, tiles in enumerate(found(policy, qkv)):
        it = case(qkv, head)
        assert contains(tiles, rule(policy, it, policy.tau - CLOSE))
        assert contains(rule(policy, it, policy.tau + CLOSE), tiles)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("stride", [8, 16])
def test_the_tiles_are_the_rules(size: tuple[int, int], block: Any, stride: Any) -> None:
    policy = XAttention(tau=0.8, stride=stride, block=block, **WINDOW)
    assert_the_rule(policy, sum(size), size)


@settings(deadline=None, max_examples=20)
@given(
    size=SIZES,
    seed=st.integers(0, 1000),
    more=st.fixed_dictionaries(
        {
            "tau": st.floats(0.05, 0.95),
            "stride": st.sampled_from([4, 8, 16, 32, 64]),
            "block": st.sampled_from([64, 128]),
            "tile": st.sampled_from([16, 32, 64]),
            "sink": st.integers(1, 100),
            "local": st.integers(0, 200),
        }
    ),
)
def test_of_any_step(size: tuple[int, int], seed: int, more: dict[str, Any]) -> None:
    assert_the_rule(XAttention(**more), seed, size)


def test_a_whole_prompt_and_its_chunks_keep_the_same() -> None:
    qkv, policy = step(5, 1100, 1100), XAttention(tau=0.7, **WINDOW)
    whole = found(policy, qkv)
    assert in_chunks(policy, qkv, 256) == whole
    assert 0 < sum(map(len, whole[0])) < 0.8 * sum(range(4, 70, 4))


def test_a_pair_of_q_blocks_is_judged_together() -> None:
    tiles = found(XAttention(tau=0.6, **WINDOW), step(6, 640, 1280))[0]
    for even, odd in zip(tiles[::2], tiles[1::2], strict=True):
        # The diagonal apart.
        assert even == {tile for tile in odd if tile <= max(even)}


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "xattention"}) == XAttention(tau=0.9, stride=8, block=128)
    assert XAttention(tau=0.9).scaled(2).tau == pytest.approx(0.8)
    assert XAttention(tau=0.4).scaled(3).tau == 0
    assert XAttention(tau=0.4).scaled(0).tau == 1
    for wrong in ({"tau": 1.1}, {"tau": -0.1}, {"stride": 12}, {"block": 32}, {"taus": 2}):
        with pytest.raises(ValueError, match="xattention"):
            parse_policy({"selector": "xattention", **wrong})
