"""Generalized neighborhood attention against a transcription of its rule, and MoA's spans, which
`static` has."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from _rules import SIZES, Case, Tiles, case, contains, found, in_chunks, owed, step
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.ops.reference import select
from vllm_sparse_backend.selection import Static, parse_policy
from vllm_sparse_backend.selection.neighborhood import Neighborhood

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def rule(policy: Neighborhood, it: Case) -> Tiles:
    """Every query of a q block, there or not, with every key: the window of its group's last."""
    wanted = []
    for number, _, end in it.q_blocks():
        keys = set()
        for i in range(64 * number, 64 * number + 64):
            leader = i // policy.stride * policy.stride + policy.stride - 1
            keys |= {j for j in range(end) if leader - j < policy.window}
        wanted.append(sorted(keys))
    return owed(policy, it, wanted)


@settings(deadline=None, max_examples=60)
@given(
    SIZES,
    st.integers(1, 700).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))),
    st.sampled_from([16, 32, 64]),
)
@example((700, 700), (256, 256), 16)
@example((700, 700), (100, 1), 16)
def test_the_tiles_are_the_rules(size: tuple[int, int], shape: tuple[int, int], tile: Any) -> None:
    policy = Neighborhood(window=shape[0], stride=shape[1], tile=tile, **WINDOW)
    qkv = step(0, *size)
    assert found(policy, qkv) == [rule(policy, case(qkv, head)) for head in range(2)]


@pytest.mark.parametrize("size", [50, 64, 300])
@pytest.mark.parametrize("stride", [1, 48, 256])
def test_chunks_of_a_prompt_keep_what_the_whole_one_does(size: int, stride: int) -> None:
    qkv, policy = step(5, 1100, 1100), Neighborhood(window=300, stride=stride, **WINDOW)
    whole = found(policy, qkv)
    if size % 64 == 0:
        assert in_chunks(policy, qkv, size) == whole
        return
    # A q block that is there in two parts: both keep what it does, as far as they may see it.
    (parts, _), blocks = in_chunks(policy, qkv, size), list[int]()
    for at in range(0, 1100, size):
        blocks += range(at // 64, (min(at + size, 1100) - 1) // 64 + 1)
    for block, tiles in zip(blocks, parts, strict=True):
        assert tiles <= whole[0][block]
        assert whole[0][block] - tiles <= set(range(max(tiles), 10**6))


def test_blocked_attention_sees_its_own_block() -> None:
    (tiles, _) = found(Neighborhood(window=128, stride=128, **WINDOW), step(1, 640, 640))
    for block, kept in enumerate(tiles):
        begin = block // 2 * 8
        assert kept == {0} | set(range(begin, 4 * block + 4))


def test_a_wider_window_keeps_more() -> None:
    qkv = step(2, 700, 1400)
    every = [found(it.model_copy(update=WINDOW), qkv)[0] for it in Neighborhood.ladder()]
    for more, less in itertools.pairwise(every):
        assert contains(more, less)
    assert every[0] != every[-1]


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "neighborhood"}) == Neighborhood(window=2048, stride=256)
    assert Neighborhood() in Neighborhood.ladder()
    assert Neighborhood().scaled(2) is None
    with pytest.raises(ValueError, match="stride: want at most the window, 100, got 200"):
        parse_policy({"selector": "neighborhood", "window": 100, "stride": 200})
    for wrong in ({"window": 0}, {"stride": 0}, {"stride": 2.5}):
        with pytest.raises(ValueError, match="neighborhood"):
            parse_policy({"selector": "neighborhood", **wrong})


# MoA


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2000),
    st.integers(64, 600),  # a head's alpha, in tokens; the sink of 64 is part of the span
    st.sampled_from([0.0, 0.125, 0.25, 0.5]),  # its beta
)
def test_static_has_moas_spans_with_their_length_law(length: int, alpha: int, beta: float) -> None:
    """MoA (arXiv 2406.14909, section 4.1): a head's span is alpha + beta * N tokens, of which the
    first 64 are the sink and the others lie before the query. N is the prompt's length there and
    what has been read of it here, so that for the last q block both are the same."""
    sink = 64
    policy = Static(sink=sink, local=alpha - sink, growth=beta)
    q, k, _ = step(0, length, length, heads=1)
    tiles = select(q, k, [policy], 0.125)
    for at, block in enumerate(tiles.blocks):
        span = alpha + beta * (block.start + 64)
        kept = {
            j // 16 for j in range(block.end) if j < sink or j >= block.start - int(span - sink)
        }
        assert set(tiles.row(0, at).tolist()) == kept
