"""HyperAttention's sorted blocks and drawn keys against a transcription of its rule."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from _rules import (
    SHAPES,
    Array,
    Case,
    Tiles,
    case,
    contains,
    found,
    in_chunks,
    owed,
    poisoned,
    step,
    view_of,
)

from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.hyper import Hyper
from vllm_sparse_backend.selection.kept import kept_tiles

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}


def tour(planes: int) -> list[str]:
    """All sides of some planes, each one plane away from the one before: the reflected code."""
    if planes == 0:
        return [""]
    shorter = tour(planes - 1)
    return ["0" + code for code in shorter] + ["1" + code for code in reversed(shorter)]


def hashed(vectors: Array, planes: Array) -> list[int]:
    """The place on the tour of the sides that each vector lies on."""
    places = {code: place for place, code in enumerate(tour(planes.shape[1]))}
    sides = vectors @ planes > 0
    return [places["".join("01"[int(side)] for side in row[::-1])] for row in sides]


def rule(policy: Hyper, it: Case) -> list[list[tuple[int, int, Counter[int]]]]:
    """Of each q block and larger half: its first key, how many, and the pairs of query and key
    in the same sorted block, by tile."""
    numbers = torch.Generator().manual_seed(policy.seed)
    planes = torch.randn(it.q.shape[1], policy.projections, generator=numbers).double().numpy()
    of_k, every = hashed(it.k, planes), []
    for number, first, end in it.q_blocks():
        own = []
        size = policy.exact
        while size < it.seq_len:
            half = 64 * number // size  # of the parts of twice the size, the odd ones look back
            if half % 2:
                rows = it.present(half * size, (half + 1) * size)
                q_hash = hashed(np.array([it.row(p) for p in rows]), planes)
                keys = range((half - 1) * size, half * size)
                blocks = max(1, size // policy.block)
                in_order = sorted(keys, key=lambda j: of_k[j])
                k_block = {j: min(i // policy.block, blocks - 1) for i, j in enumerate(in_order)}
                q_order = sorted(range(len(rows)), key=lambda i: q_hash[i])
                q_block = {rows[i]: at * blocks // len(rows) for at, i in enumerate(q_order)}
                pairs = Counter(
                    j // policy.tile
                    for p in range(first, end)
                    for j in keys
                    if q_block[p] == k_block[j]
                )
                own.append((keys.start, size, pairs))
            size *= 2
        every.append(own)
    return every


def check(policy: Hyper, it: Case, kept: Tiles) -> None:
    """Kept are the dense part, of each half the tiles with most pairs, the earlier ones of equals,
    and nothing else but drawn ones, of which there are none here."""
    wanted = []
    for (number, _, end), own in zip(it.q_blocks(), rule(policy, it), strict=True):
        begin = 64 * number // policy.exact * policy.exact
        keys = list(range(begin, end))
        for start, size, pairs in own:
            tiles = range(start // policy.tile, (start + size) // policy.tile)
            best = sorted(tiles, key=lambda tile: -pairs[tile])[: policy.block // policy.tile]
            keys += [p for t in best for p in range(t * policy.tile, (t + 1) * policy.tile)]
        wanted.append(keys)
    assert kept == owed(policy, it, wanted)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("exact", "block"), [(64, 64), (192, 64), (256, 128), (64, 128)])
@pytest.mark.parametrize("tile", [16, 64])
def test_the_tiles_are_the_rules(size: tuple[int, int], exact: int, block: int, tile: Any) -> None:
    for more in (WINDOW, {"sink": 70, "local": 100, "growth": 0.1}):
        policy = Hyper(exact=exact, block=block, samples=0, projections=5, tile=tile, **more)
        qkv = step(sum(size), *size)
        for head, tiles in enumerate(found(policy, qkv)):
            check(policy, case(qkv, head), tiles)


def test_neighbours_on_the_tour_are_one_plane_apart() -> None:
    from vllm_sparse_backend.selection.hyper import _hashed

    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)))
    places, unknown = _hashed(corners, torch.eye(7))
    assert sorted(places.tolist()) == list(range(128)) and not unknown.any()
    on_tour = corners[places.argsort()]
    assert ((on_tour[1:] != on_tour[:-1]).sum(1) == 1).all()


@pytest.mark.parametrize("samples", [64, 128])
def test_drawn_tiles_are_added(samples: int) -> None:
    qkv = step(3, 600, 1472)
    plain = Hyper(exact=128, block=64, samples=0, **WINDOW)
    drawn = plain.model_copy(update={"samples": samples})
    own, with_drawn = found(plain, qkv), found(drawn, qkv)
    for head in range(2):
        assert contains(with_drawn[head], own[head])
    halves = [len(it) for it in rule(plain, case(qkv, 0))]
    more = [len(a - b) for a, b in zip(with_drawn[0], own[0], strict=True)]
    for count, most in zip(more, halves, strict=True):
        assert count <= most * samples // 16
    assert sum(more) > 0.5 * sum(halves) * samples // 16
    # Of a head's own, however many rows are there, and of a seed.
    assert found(drawn, qkv) == with_drawn
    assert with_drawn[0] != found(drawn.model_copy(update={"seed": 1}), qkv)[0]
    view = view_of(qkv)
    extra = kept_tiles(drawn, view) & ~kept_tiles(plain, view)
    assert not torch.equal(extra[0], extra[1])


def test_chunks_of_whole_parts_keep_what_the_whole_prompt_does() -> None:
    qkv, policy = step(5, 1024, 1024), Hyper(exact=128, block=64, samples=64, **WINDOW)
    whole = found(policy, qkv)
    assert in_chunks(policy, qkv, 512) == whole
    # The last 512 queries, halved, sort themselves apart; of smaller parts nothing is cut.
    cut = in_chunks(policy, qkv, 256)[0]
    assert cut[:8] == whole[0][:8]
    assert cut[8:] != whole[0][8:]


def test_a_larger_dense_part_keeps_more() -> None:
    qkv = step(7, 500, 1472)
    parts = (2048, 1024, 512, 256, 128, 64)
    every = [found(Hyper(exact=exact, block=64, samples=64, **WINDOW), qkv) for exact in parts]
    for more, less in itertools.pairwise(every):
        assert contains(more[0], less[0]) and contains(more[1], less[1])
    assert every[0] != every[-1]


def test_what_cannot_be_judged_is_kept() -> None:
    policy = Hyper(exact=128, block=64, samples=64, **WINDOW)
    qkv = step(4, 320, 1344)
    for head in found(policy, poisoned(qkv, key=500)):
        assert all(500 // 16 in tiles for tiles in head)
    for head in found(policy, poisoned(qkv, row=1343)):
        assert len(head[-1]) == 84


def test_it_is_a_policy() -> None:
    default = Hyper(exact=4096, block=256, samples=256, projections=7, seed=0)
    assert parse_policy({"selector": "hyper"}) == default
    assert Hyper().scaled(2) is None
    assert Hyper() in Hyper.ladder()
    for wrong in ({"exact": 100}, {"projections": 0}, {"block": 32}, {"seed": -1}):
        with pytest.raises(ValueError, match="hyper"):
            parse_policy({"selector": "hyper", **wrong})
