"""The reference: its rules element by element, its attention against torch."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from _attention import BITS, DTYPES, assert_accurate, causal_mask, element_mask, make_qkv, tie_width

from vllm_sparse_backend.ops import TileList, reference, sparse_attention
from vllm_sparse_backend.selection import DENSE, Bits, Mass, Policy, Sale, Static, estimate


def static_tiles(policy: Static | Sale | Mass, start: int, end: int) -> set[int]:
    """Sink and local tiles of a q block, key by key."""
    local = policy.local + math.floor(policy.growth * (start + 64))
    sink = {key // policy.tile for key in range(min(policy.sink, end))}
    near = {key // policy.tile for key in range(max(0, start - local), end)}
    return sink | near


@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize(
    ("sink", "local", "growth"), [(1, 0, 0.0), (64, 256, 0.0), (17, 33, 0.1), (65, 1, 1.0)]
)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (500, 500), (77, 700), (1, 640), (64, 641)])
def test_static_keeps_sink_and_window(
    tile: int, sink: int, local: int, growth: float, rows: int, length: int
) -> None:
    policy = Static(sink=sink, local=local, growth=growth, tile=tile)  # type: ignore[arg-type]
    q, k, _ = make_qkv(0, rows, length, heads=1, kv_heads=1, dim=16)
    tiles = reference.select(q, k, [policy], 0.25)
    assert tiles.blocks[-1].end == length
    for block, (start, _, end) in enumerate(tiles.blocks):
        assert set(tiles.row(0, block).tolist()) == static_tiles(policy, start, end)


FP4 = (0, 1, 2, 3, 4, 6, 8, 12)  # E2M1 in halves; of two as near, the one of even mantissa


def nearest_fp4(x: float) -> float:
    nearest = min(range(8), key=lambda i: (abs(abs(x) - FP4[i]), i % 2))
    return math.copysign(FP4[nearest], x)


def scored_margins(
    policy: Sale | Mass, q: torch.Tensor, k: torch.Tensor, scale: float
) -> dict[tuple[int, int], float]:
    """SALE's rule element by element: by (q block start, tile), the best estimate's margin.

    Quantization in fp32 as specified, everything else in float64; always-kept tiles have
    no entry.
    """
    rows, keys = q.double().numpy(), k.double().numpy()
    offset, length = len(k) - len(q), len(k)
    key_max = {4: 7, 6: 31, 8: 127, "fp4": 12}[policy.bits]
    query_max = min(key_max, 63)
    gaps = 64 // policy.row_stride - 1
    sampled = {math.floor(i * 63 / gaps + 0.5) for i in range(gaps + 1)}
    mean = keys.mean(0).astype(np.float32)

    def integers(x: np.ndarray, peak: np.float32, most: int) -> tuple[np.ndarray, float]:
        if peak == 0:
            return np.zeros(x.shape), 0.0
        scaled = x * (np.float32(most) / peak)
        if policy.bits == "fp4":
            codes = np.vectorize(nearest_fp4)(scaled)
        else:
            codes = np.rint(scaled).clip(-most, most)
        return codes, float(peak / np.float32(most))

    centred = keys.astype(np.float32) - mean
    found: dict[tuple[int, int], float] = {}
    for start in range(offset // 64 * 64, length, 64):
        end = min(start + 64, length)
        always = static_tiles(policy, start, end)
        for p in range(max(start, offset), end):
            edge = p in (max(start, offset), end - 1)
            if not edge and p % 64 not in sampled and p < length - policy.tail:
                continue
            row = rows[p - offset]
            seen = [j for j in range(p + 1) if j // policy.tile in always]
            s = scale * keys[seen] @ row
            threshold = s.max() + math.log(policy.tau * np.exp(s - s.max()).sum())
            peak = np.abs(row).astype(np.float32).max()
            qi, q_step = integers(row.astype(np.float32), peak, query_max)
            weights: dict[int, list[float]] = defaultdict(list)
            for j in range(end):
                if j // policy.tile in always:
                    continue
                group = centred[j // 16 * 16 : j // 16 * 16 + 16]
                ki, k_step = integers(centred[j], np.abs(group).max(), key_max)
                estimate = scale * (q_step * k_step * float(qi @ ki) + float(row @ mean))
                weights[j // policy.tile].append(estimate - threshold)
            for tile, excess in weights.items():
                margin = max(excess)
                if isinstance(policy, Mass):
                    margin = math.log(sum(map(exp_linear, excess)))
                found[start, tile] = max(found.get((start, tile), -math.inf), margin)
    return found


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_of_a_short_question_a_row_is_scored_in_every_block_it_touches(stride: int) -> None:
    policy = Sale(row_stride=stride, tail=0)  # type: ignore[arg-type]
    scored = [estimate.scored_rows(policy, at, at + 64, 10_000).tolist() for at in (0, 64)]
    assert [len(rows) for rows in scored] == [64 // stride] * 2
    for first in range(64):
        question = range(first, first + stride + 1)
        for block, rows in enumerate(scored):
            inside = [row for row in question if row // 64 == block]
            assert not inside or set(inside) & set(rows)


def exp_linear(x: float) -> float:
    """e^x, linear between powers of two."""
    whole = math.floor(x / math.log(2))
    return float((1 + x / math.log(2) - whole) * 2.0**whole)


@pytest.mark.parametrize("selector", [Sale, Mass])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("tile", "row_stride", "tail"), [(16, 4, 30), (32, 1, 0), (64, 8, 0)])
@pytest.mark.parametrize(("rows", "length", "tau"), [(210, 340, 0.02), (70, 333, 0.1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scored_selectors_follow_their_rule_element_by_element(
    selector: type[Sale | Mass],
    bits: Bits,
    tile: int,
    row_stride: int,
    tail: int,
    rows: int,
    length: int,
    tau: float,
    dtype: torch.dtype,
) -> None:
    policy = selector(
        sink=3,
        local=20,
        tile=tile,  # type: ignore[arg-type]
        bits=bits,
        row_stride=row_stride,  # type: ignore[arg-type]
        tail=tail,
        tau=tau if selector is Sale else 4 * tau,
    )
    q, k, _ = make_qkv(1, rows, length, heads=1, kv_heads=1, dim=16, dtype=dtype)
    tiles = reference.select(q, k, [policy], 0.25)
    width = tie_width(q[:, 0], k[:, 0], 0.25)
    wanted = scored_margins(policy, q[:, 0], k[:, 0], 0.25)
    kept = ties = 0
    for block, (start, _, end) in enumerate(tiles.blocks):
        row = set(tiles.row(0, block).tolist())
        assert static_tiles(policy, start, end) <= row
        for tile_id in range(-(-end // tile)):
            margin = wanted.get((start, tile_id), math.inf)
            if abs(margin) <= width:
                ties += 1
                continue
            assert (tile_id in row) == (margin > 0)
            kept += tile_id in row and (start, tile_id) in wanted
    assert ties <= 1
    assert 0 < kept < len(wanted), "the case shows nothing"


def test_4_bit_floats_round_to_the_nearest_and_halves_to_even() -> None:
    x = torch.arange(-12, 12.0001, 0.125)[:, None]
    x = torch.cat([x, torch.full_like(x, 12)], 1)  # so that every row's step is 1
    ints, step = estimate.quantize(x, estimate.KEY_CODES, "fp4")
    assert ints[:, 0].tolist() == [nearest_fp4(float(one)) for one in x[:, 0]]
    assert (step == 1).all()


def test_sale_finds_a_far_needle_that_static_misses() -> None:
    q, k, _ = make_qkv(2, 512, 512, heads=1, kv_heads=1)
    k[100] = (2.5 * q[400]).squeeze(0)
    for policy, found in ((Static(local=64), False), (Sale(local=64, tau=0.5), True)):
        tiles = reference.select(q, k, [policy], 0.125)
        assert (100 // 16 in tiles.row(0, 400 // 64).tolist()) is found


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_inputs_that_are_not_finite_keep_tiles(poison: float, where: str) -> None:
    q, k, _ = make_qkv(3, 256, 256, heads=1, kv_heads=1)
    policy = Sale(sink=16, local=0, tau=1.0)
    (q if where == "q" else k)[128, 0, 5] = poison
    mask = reference.select(q, k, [policy], 0.125).mask(0)
    hit = slice(2, 3) if where == "q" else slice(0, 4)
    assert mask[hit].sum(1).tolist() == [4, 8, 12, 16][hit]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("bits", BITS)
def test_constant_keys(value: float, bits: Bits) -> None:
    q, k, v = make_qkv(4, 300, 300, heads=1, kv_heads=1)
    k.fill_(value)
    # All scores of a row are one value: exp(s - m) / l = 1 / l, with 16 to 80 keys in l.
    for tau, everything in ((0.5, False), (0.01, True)):
        policy = Sale(sink=16, local=0, tau=tau, bits=bits)
        out, stats = sparse_attention(q, k, v, policy, impl="reference")
        assert out.isfinite().all()
        assert (stats.density == [1.0]) is everything
    ints, step = estimate.quantize(torch.zeros(5, 8), estimate.KEY_CODES, bits)
    assert not ints.any()
    assert not step.any()


def test_quantize_rounds_half_to_even_and_is_exact_at_the_peak() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0]])
    ints, step = estimate.quantize(x, estimate.KEY_CODES, 8)
    assert ints.tolist() == [[127, 0, 2, 2, 0, -127]]
    assert step.tolist() == [1.0]


def test_key_groups_are_aligned_and_ragged_at_the_end() -> None:
    k = torch.zeros(35, 2)
    k[:, 0] = torch.arange(35)
    keys, mean = estimate.quantize_keys(k, 8)
    assert mean.tolist() == [17.0, 0.0]
    assert [round(float(s) * 127, 4) for s in keys.step[[0, 15, 16, 31, 32, 34]]] == [
        17, 17, 14, 14, 17, 17
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", [DENSE, Static(sink=20, local=30), Sale(local=16, tau=0.1)])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 200), (65, 65), (300, 300), (70, 333)])
def test_attention_over_the_tiles_is_accurate(
    dtype: torch.dtype, policy: object, rows: int, length: int
) -> None:
    qkv = make_qkv(5, rows, length, heads=6, kv_heads=2, dim=80, dtype=dtype)
    q, k, v = qkv
    tiles = reference.select(q, k, [policy] * 6, 80**-0.5)  # type: ignore[list-item]
    out = reference.attend(q, k, v, tiles, 80**-0.5)
    assert_accurate(out, qkv, element_mask(tiles))
    if policy == DENSE:
        assert_accurate(out, qkv, causal_mask(rows, length))


def test_tile_list_round_trips() -> None:
    q, k, _ = make_qkv(6, 200, 350, heads=3, kv_heads=1)
    policies: list[Policy] = [DENSE, Static(local=10, tile=32), Sale(local=10, tile=64, tau=0.2)]
    tiles = reference.select(q, k, policies, 0.125)
    subtiles = torch.zeros(3, len(tiles.blocks), 22, dtype=torch.uint8)
    for head, size in enumerate(tiles.tile_sizes):
        for block, edges in enumerate(tiles.blocks):
            for tile in tiles.row(head, block).tolist():
                first, last = tile * size, min((tile + 1) * size, edges.end)
                subtiles[head, block, first // 16 : -(-last // 16)] = 1
    again = TileList.from_subtiles(subtiles, tiles.tile_sizes, 200, 350)
    assert torch.equal(again.tiles, tiles.tiles)
    assert torch.equal(again.indptr, tiles.indptr)
    for head in range(3):
        assert tiles.computed[head] == int(tiles.mask(head).sum())
    assert tiles.computed[0] == tiles.causal[0]
    subtiles[1, 0, 0] ^= 1
    with pytest.raises(ValueError, match=r"head 1, .*not whole tiles of 32"):
        TileList.from_subtiles(subtiles, tiles.tile_sizes, 200, 350)
    with pytest.raises(ValueError, match=r"want \[3, 4, 22\], got \[3, 4, 21\]"):
        TileList.from_subtiles(subtiles[..., 1:], tiles.tile_sizes, 200, 350)


@pytest.mark.parametrize(
    ("indptr", "tiles", "message"),
    [
        ([0, 1, 2], [0, 0], None),
        ([0, 1], [0], r"indptr: want \[3\]"),
        ([0, 1, 3], [0, 0], r"tiles: want \[3\] torch.int32, got \[2\]"),
        ([1, 1, 2], [0, 0], "ascend from 0"),
        ([0, 2, 1], [0], "ascend from 0"),
        ([0, 2, 4], [0, 1, 1, 1], "head 0, q block 1: want ascending unique numbers below 5"),
        ([0, 1, 2], [4, 4], r"head 0, q block 0: .* below 4, got \[4\]"),
        ([0, 1, 2], [-1, 0], r"head 0, q block 0: .* below 4, got \[-1\]"),
    ],
)
def test_tile_list_is_validated(indptr: list[int], tiles: list[int], message: str | None) -> None:
    made = TileList(torch.tensor(indptr), torch.tensor(tiles, dtype=torch.int32), (16,), 66, 66)
    if message is None:
        made.validate()
    else:
        with pytest.raises(ValueError, match=message):
            made.validate()
