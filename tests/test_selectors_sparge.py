"""SpargeAttn's selection against a transcription of its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _rules import (
    SCALE,
    SHAPES,
    SIZES,
    Array,
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
from vllm_sparse_backend.selection.sparge import Sparge

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}
CLOSE = 1e-4


def similarity(block: Array) -> float:
    """The mean cosine of all pairs, each with itself among them."""
    lengths = np.linalg.norm(block, axis=1)
    return float(np.mean(block @ block.T / np.outer(lengths, lengths))) if all(lengths) else np.nan


def rule(policy: Sparge, it: Case, tau: float) -> Tiles:
    size, count = policy.rows, (it.seq_len + 63) // 64
    keys = [it.k[at : at + 64] for at in range(0, it.seq_len, 64)]
    mean = it.k.mean(0) if policy.smooth_k else 0.0
    alike = [similarity(block - mean) > policy.alike for block in keys]
    kept = {}
    for block in row_blocks(it, size):
        rows = np.array([it.row(p) for p in it.present(block * size, block * size + size)])
        seen = [j for j in range(count) if j * 64 < (block + 1) * size]
        kept[block] = {j for j in seen if not alike[j]}
        if not similarity(rows) > policy.alike:
            kept[block] = set(seen)
        judged = [j for j in seen if alike[j]]
        if not judged:
            continue
        scores = [float(rows.mean(0) @ keys[j].mean(0)) * SCALE for j in judged]
        ranked = sorted(zip(softmax(np.array(scores)), judged, strict=True), reverse=True)
        total = 0.0
        for at, (weight, j) in enumerate(ranked):
            total += float(weight)
            if total <= tau or at == 0:
                kept[block].add(j)
    return owed(policy, it, of_blocks(it, size, kept, 64))


def assert_the_rule(policy: Sparge, seed: int, size: tuple[int, int]) -> None:
    qkv = step(seed, *size)
    for head, tiles in enumerate(found(policy, qkv)):
        it = case(qkv, head)
        assert contains(tiles, rule(policy, it, policy.tau - CLOSE))
        assert contains(rule(policy, it, policy.tau + CLOSE), tiles)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("smooth", [True, False])
def test_the_tiles_are_the_rules(size: tuple[int, int], rows: Any, smooth: bool) -> None:
    for alike in (-1.0, 0.02, 0.3, 1.0):
        policy = Sparge(tau=0.8, alike=alike, rows=rows, smooth_k=smooth, **WINDOW)
        assert_the_rule(policy, sum(size), size)


@settings(deadline=None, max_examples=15)
@given(
    size=SIZES,
    seed=st.integers(0, 1000),
    more=st.fixed_dictionaries(
        {
            "tau": st.floats(0.05, 0.95),
            "alike": st.floats(-0.1, 0.5),
            "rows": st.sampled_from([64, 128]),
            "smooth_k": st.booleans(),
            "tile": st.sampled_from([16, 32, 64]),
            "sink": st.integers(1, 100),
            "local": st.integers(0, 200),
        }
    ),
)
def test_of_any_step(size: tuple[int, int], seed: int, more: dict[str, Any]) -> None:
    assert_the_rule(Sparge(**more), seed, size)


def test_blocks_that_are_not_alike_are_computed() -> None:
    q, k, v = step(3, 256, 1024)
    k[:] = k[:1]  # all alike,
    k[320:384] = torch.randn(64, 1, 64)  # but for one
    q[:] = q[:1]
    policy = Sparge(tau=0.0, alike=0.5, smooth_k=False, **WINDOW)
    for tiles in found(policy, (q, k, v))[0]:
        assert tiles >= {20, 21, 22, 23}
        assert len(tiles) < 16
    q[200:256] = torch.randn(56, 2, 64)
    counts = [len(tiles) for tiles in found(policy, (q, k, v))[0]]
    assert counts[2:] == [60, 64]
    assert max(counts[:2]) < 16


def test_a_whole_prompt_and_its_chunks_keep_the_same() -> None:
    qkv, policy = step(5, 1100, 1100), Sparge(tau=0.7, alike=0.05, smooth_k=False, **WINDOW)
    whole = found(policy, qkv)
    assert in_chunks(policy, qkv, 256) == whole


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "sparge"}) == Sparge(
        tau=0.98, alike=0.6, rows=128, smooth_k=False
    )
    assert Sparge(tau=0.9).scaled(2).tau == pytest.approx(0.8)
    assert Sparge(tau=0.4).scaled(0).tau == 1
    for wrong in ({"tau": 1.1}, {"alike": 2.0}, {"rows": 32}, {"smooth_k": 1}):
        with pytest.raises(ValueError, match="sparge"):
            parse_policy({"selector": "sparge", **wrong})
