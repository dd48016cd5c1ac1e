"""MInference's block-sparse pattern against a transcription of its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from _rules import SHAPES, Case, Tiles, case, found, in_chunks, of_blocks, owed, step

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.block_topk import BlockTopK

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def rule(policy: BlockTopK, it: Case) -> Tiles:
    """Means of 64 rows and of 64 keys, their products, the highest."""
    kept = {}
    for number, first, end in it.q_blocks():
        mean = np.mean([it.row(p) for p in range(first, end)], axis=0)
        scores = [mean @ it.k[at : at + 64].mean(0) for at in range(0, end, 64)]
        ranked = sorted(range(len(scores)), key=lambda j: -scores[j])
        kept[number] = set(ranked[: policy.blocks])
    return owed(policy, it, of_blocks(it, 64, kept, 64))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("blocks", [1, 3, 8])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_the_tiles_are_the_rules(size: tuple[int, int], blocks: int, tile: Any) -> None:
    for more in (WINDOW, {"sink": 70, "local": 100, "growth": 0.1}):
        policy = BlockTopK(blocks=blocks, tile=tile, **more)
        qkv = step(sum(size), *size)
        for head, tiles in enumerate(found(policy, qkv)):
            assert tiles == rule(policy, case(qkv, head))


@pytest.mark.parametrize("size", [64, 192, 256])
def test_a_whole_prompt_and_its_chunks_keep_the_same(size: int) -> None:
    qkv, policy = step(5, 1100, 1100), BlockTopK(blocks=3, **WINDOW)
    whole = found(policy, qkv)
    assert in_chunks(policy, qkv, size) == whole


def test_as_many_as_there_are_is_all() -> None:
    qkv = step(6, 500, 700)
    for tiles in found(BlockTopK(blocks=11, **WINDOW), qkv):
        assert [len(kept) for kept in tiles] == [
            -(-end // 16) for _, _, end in case(qkv, 0).q_blocks()
        ]
    assert len(found(BlockTopK(blocks=9, **WINDOW), qkv)[0][-1]) < 44


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "block_topk"}) == BlockTopK(blocks=100)
    assert BlockTopK().scaled(2) is None
    for wrong in ({"blocks": 0}, {"blocks": 2.0}, {"top_k": 2}):
        with pytest.raises(ValueError, match="block_topk"):
            parse_policy({"selector": "block_topk", **wrong})
