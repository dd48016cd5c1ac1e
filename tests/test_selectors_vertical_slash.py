"""MInference's vertical-slash pattern against a transcription of its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _rules import SCALE, SHAPES, Case, Tiles, case, chunk, found, looking, owed, softmax, step

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.vertical_slash import VerticalSlash

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def rule(policy: VerticalSlash, it: Case) -> Tiles:
    """Sums over the last 64 rows, the highest, and for each row the keys there."""
    columns, diagonals = np.zeros(it.seq_len), np.zeros(it.seq_len)
    for row in range(max(it.offset, it.seq_len - 64), it.seq_len):
        for key, weight in enumerate(softmax(it.k[: row + 1] @ it.row(row) * SCALE)):
            columns[key] += weight
            diagonals[row - key] += weight
    columns[:30] = diagonals[:100] = np.inf
    column = sorted(range(it.seq_len), key=lambda j: -columns[j])[: policy.columns]
    distance = sorted(range(it.seq_len), key=lambda j: -diagonals[j])[: policy.diagonals]
    keys = []
    for _, first, end in it.q_blocks():
        slashes = {row - d for row in range(first, end) for d in distance if row >= d}
        keys.append(slashes | set(column))
    return owed(policy, it, keys)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("pair", [(30, 100), (60, 100), (30, 150), (100, 300)])
@pytest.mark.parametrize("tile", [16, 64])
def test_the_tiles_are_the_rules(size: tuple[int, int], pair: tuple[int, int], tile: Any) -> None:
    for more in (WINDOW, {"sink": 70, "local": 100, "growth": 0.1}):
        policy = VerticalSlash(columns=pair[0], diagonals=pair[1], tile=tile, **more)
        qkv = step(sum(size), *size)
        for head, tiles in enumerate(found(policy, qkv)):
            assert tiles == rule(policy, case(qkv, head))


def test_each_chunk_is_judged_by_its_own_last_rows() -> None:
    """A key that only the last rows of a chunk look at is computed for all of the chunk, and for no
    other."""
    qkv = looking(step(4, 1024, 1024), 200, slice(448, 512))
    policy = VerticalSlash(columns=31, diagonals=100, **WINDOW)
    asked = found(policy, chunk(qkv, 256, 512))[0]
    assert all(200 // 16 in tiles for tiles in asked)
    other = found(policy, chunk(qkv, 512, 1024))[0]
    assert all(200 // 16 not in tiles for tiles in other)


def test_a_chunk_of_fewer_rows_is_asked_as_it_is() -> None:
    qkv = step(9, 20, 500)
    policy = VerticalSlash(columns=40, diagonals=110, **WINDOW)
    assert found(policy, qkv)[0] == rule(policy, case(qkv, 0))


def test_a_diagonal_is_followed() -> None:
    """One distance at which every row looks: all q blocks compute the keys that far before them."""
    q, k, v = step(10, 1024, 1024)
    far = 700
    q[far:, 0], k[:-far, 0] = q[far:, 0] * 0.2, q[far:, 0] * 6
    q[far:, 0] = q[far:, 0] * 5
    tiles = found(VerticalSlash(columns=30, diagonals=101, **WINDOW), (q, k, v))[0]
    for number in range(far // 64 + 1, 16):
        wanted = {p // 16 for p in range(64 * number - far, 64 * number + 64 - far)}
        assert tiles[number] >= wanted
        assert len(tiles[number]) < 25


def test_nothing_but_the_last_rows_is_looked_at() -> None:
    q, k, v = step(11, 300, 600)
    policy = VerticalSlash(columns=40, diagonals=110)
    tiles = found(policy, (q, k, v))
    q[:236] = torch.nan
    assert found(policy, (q, k, v)) == tiles


def test_it_is_a_policy() -> None:
    policy = parse_policy({"selector": "vertical_slash"})
    assert policy == VerticalSlash(columns=1000, diagonals=6096)
    assert VerticalSlash().scaled(2) is None
    for wrong in ({"columns": 29}, {"diagonals": 99}, {"columns": 40.0}, {"slash": 300}):
        with pytest.raises(ValueError, match="vertical_slash"):
            parse_policy({"selector": "vertical_slash", **wrong})
