"""AnchorAttention against a transcription of its rule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from _rules import (
    SCALE,
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
from vllm_sparse_backend.selection.anchor import Anchor

WINDOW: dict[str, Any] = {"sink": 40, "local": 0}


def rule(policy: Anchor, it: Case) -> Tiles:
    """Row by row and key by key: a superblock's columns, and the superblock itself."""
    span, wanted = 128 * policy.superblock, []
    columns: dict[int, set[int]] = {}
    for number, _, end in it.q_blocks():
        start = 64 * number // span * span
        if start not in columns:
            columns[start] = set()
            for pool in range(start, start + span, 128):
                rows = it.present(pool, pool + 128)
                if not rows:
                    continue
                anchors = [
                    max(
                        SCALE * it.row(p) @ it.k[j]
                        for j in range(p + 1)
                        if j < policy.sink or j >= start
                    )
                    for p in rows
                ]
                q, m = np.mean([it.row(p) for p in rows], axis=0), np.mean(anchors)
                near = SCALE * it.k[:start] @ q + policy.theta >= m
                columns[start] |= set(near.nonzero()[0].tolist())
        wanted.append([*columns[start], *range(start, end)])
    return owed(policy, it, wanted)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("superblock", [1, 3])
@pytest.mark.parametrize(("theta", "tile"), [(2.0, 16), (3.5, 64), (0.0, 32)])
def test_the_tiles_are_the_rules(
    size: tuple[int, int], superblock: int, theta: float, tile: Any
) -> None:
    for more in (WINDOW, {"sink": 200, "local": 100, "growth": 0.1}):
        policy = Anchor(superblock=superblock, theta=theta, tile=tile, **more)
        qkv = step(sum(size), *size)
        for head, tiles in enumerate(found(policy, qkv)):
            assert tiles == rule(policy, case(qkv, head))


@pytest.mark.parametrize("size", [256, 512])
def test_chunks_of_whole_superblocks_keep_what_a_whole_prompt_does(size: int) -> None:
    qkv, policy = step(5, 1100, 1100), Anchor(superblock=2, theta=2.0, **WINDOW)
    whole = found(policy, qkv)
    assert in_chunks(policy, qkv, size) == whole


def test_a_part_of_a_superblock_chooses_for_itself() -> None:
    policy = Anchor(superblock=2, theta=2.0, **WINDOW)
    q, k, v = step(5, 512, 512)
    qkv = looking((q / 16, k, v), 100, slice(384, 512))  # the second half of the last one
    whole, parts = found(policy, qkv)[0], in_chunks(policy, qkv, 128)[0]
    assert [100 // 16 in tiles for tiles in whole[4:]] == [True] * 4
    assert [100 // 16 in tiles for tiles in parts[4:]] == [False] * 2 + [True] * 2


def test_a_superblock_shares_its_keys() -> None:
    """What one mean of its rows looks at, all of them compute; the next superblock does not."""
    policy = Anchor(superblock=2, theta=2.0, **WINDOW)
    q, k, v = step(6, 1024, 1024)
    qkv = q / 16, k, v
    alone = found(policy, qkv)[0]
    shown = found(policy, looking(qkv, 300, slice(640, 768)))[0]
    assert [300 // 16 in tiles for tiles in shown[8:12]] == [True] * 4, "positions 512 to 768"
    assert [300 // 16 in tiles for tiles in shown[12:]] == [300 // 16 in a for a in alone[12:]]


def test_a_higher_theta_keeps_more() -> None:
    qkv = step(7, 500, 1300)
    thetas = (100, 8, 4, 2, 1, 0)
    every = [found(Anchor(superblock=2, theta=theta, **WINDOW), qkv) for theta in thetas]
    for more, less in itertools.pairwise(every):
        assert contains(more[0], less[0]) and contains(more[1], less[1])
    assert every[0] != every[-1]
    assert [len(tiles) for tiles in every[0][0]] == [
        -(-end // 16) for _, _, end in case(qkv, 0).q_blocks()
    ]


def test_a_threshold_scale_is_of_the_weight() -> None:
    assert Anchor(theta=5).scaled(math.e) == Anchor(theta=4.0)
    assert Anchor(theta=1).scaled(100) == Anchor(theta=0.0)
    assert Anchor(theta=5).scaled(0.0) == Anchor(theta=1000.0)
    assert Anchor(theta=5).scaled(0.5).theta == pytest.approx(5 + math.log(2))


def test_what_cannot_be_judged_is_kept() -> None:
    policy, qkv = Anchor(superblock=1, theta=0.0, **WINDOW), step(4, 320, 1344)
    for head in found(policy, poisoned(qkv, key=500)):
        assert all(500 // 16 in tiles for tiles in head)
    for head in found(policy, poisoned(qkv, row=1343)):
        assert len(head[-1]) == 84


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "anchor"}) == Anchor(theta=12.0, superblock=16, sink=2048)
    assert Anchor() in Anchor.ladder()
    for wrong in ({"theta": -1.0}, {"superblock": 0}, {"theta": float("nan")}):
        with pytest.raises(ValueError, match="anchor"):
            parse_policy({"selector": "anchor", **wrong})
