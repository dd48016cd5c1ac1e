"""S2-Attention's strided shards against a transcription of the rule."""

from __future__ import annotations

from typing import Any

import pytest
from _attention import IMPLS, make_paged, make_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.ops import PolicyTable, TileList, select_tiles
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.ops.tiles import QBlock
from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.s2 import Strided


def rule(policy: Strided, head: int, block: QBlock) -> list[int]:
    """Tiles of one q block: key by key, from the paper's sentence."""
    window = policy.local + int(policy.growth_units * (block.start + 64)) // 65536
    kept = set()
    for key in range(block.end):
        tile = key // policy.tile
        shard = key // 64 % policy.stride == head % policy.stride
        sink = tile * policy.tile < policy.sink
        local = (tile + 1) * policy.tile > max(0, block.start - window)
        if shard or sink or local:
            kept.add(tile)
    return sorted(kept)


def tiles(table: PolicyTable, rows: int, seq_len: int, impl: str) -> TileList:
    paged = make_paged([make_qkv(0, rows, seq_len)])
    return select_tiles(*paged.tensors, table, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, 900).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))),
    stride=st.integers(1, 9),
    first=st.integers(0, 20),
    more=st.fixed_dictionaries(
        {
            "sink": st.integers(1, 100),
            "local": st.integers(0, 200),
            "growth": st.sampled_from([0.0, 0.1, 0.5]),
            "tile": st.sampled_from([16, 32, 64]),
        }
    ),
)
def test_the_tiles_are_the_rules(
    impl: str, size: tuple[int, int], stride: int, first: int, more: dict[str, Any]
) -> None:
    policy = Strided(stride=stride, **more)
    found = tiles(PolicyTable([policy] * 4, place=Place(0, first, 24)), *size, impl)
    for head in range(4):
        for at, block in enumerate(found.blocks):
            assert found.row(head, at).tolist() == rule(policy, first + head, block)


def test_heads_cover_the_context_between_them() -> None:
    found = tiles(PolicyTable([Strided(stride=4, sink=1, local=0)] * 4), 64, 1024, "reference")
    assert set().union(*(found.row(head, 0).tolist() for head in range(4))) == set(range(64))
    # A shard, and of the others' the first tile and the diagonal.
    assert [len(found.row(head, 0)) for head in range(4)] == [20, 21, 21, 17]


def test_a_stride_of_one_keeps_all() -> None:
    found = tiles(PolicyTable([Strided(stride=1)] * 4), 300, 1000, "reference")
    assert found.computed == found.causal


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "strided"}) == Strided(stride=8)
    for wrong in ({"stride": 0}, {"stride": 2.0}, {"strides": 2}, {"tile": 8}):
        with pytest.raises(ValueError, match="strided"):
            parse_policy({"selector": "strided", **wrong})
