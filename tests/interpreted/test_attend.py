"""Attention in Triton, interpreted, held to float64 and to what the reference says of its tiles."""

from __future__ import annotations

import pytest
import torch
from _attention import (
    DTYPES,
    HEAD_DIMS,
    assert_accurate,
    causal_mask,
    element_mask,
    make_paged,
    make_qkv,
    run,
)
from _gpu_asked import Taken

from vllm_sparse_backend.ops import PolicyTable, select_tiles, sparse_attention
from vllm_sparse_backend.ops.triton import run as launches
from vllm_sparse_backend.ops.triton.launch import launch
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Sale, Static

MIXED: list[AnyPolicy] = [
    Sale(sink=16, local=16, tau=0.05, tail=16),
    Static(sink=16, local=32, tile=32),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_dense_is_attention(dtype: torch.dtype, dim: int) -> None:
    qkv = make_qkv(dim, 70, 150, 2, 1, dim, dtype)
    out, stats = run(make_paged([qkv], "strided", 16), DENSE, "triton")
    assert_accurate(out, qkv, causal_mask(70, 150))
    assert stats.density == [1.0, 1.0]


@pytest.mark.parametrize("dim", sorted(set(HEAD_DIMS) - {64, 80, 128, 256}))
def test_every_other_head_dim(dim: int) -> None:
    qkv = make_qkv(dim, 33, 65, 1, 1, dim)
    out, _ = run(make_paged([qkv], "strided", 32), DENSE, "triton")
    assert_accurate(out, qkv, causal_mask(33, 65))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [80, 96, 112, 192])
def test_channels_that_are_read_twice_count_once(
    dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = "sm_120" if dtype == torch.float32 else "gfx942"
    monkeypatch.setattr(launches, "architecture", lambda: arch)
    assert launch(arch, dim, 1, dtype).attend_repeat
    q, k, v = make_qkv(dim, 33, 100, 1, 1, dim, dtype)
    out, _ = run(make_paged([(q, k, v)], "strided", 16), DENSE, "triton")
    assert_accurate(out, (q, k, v), causal_mask(33, 100))
    # A key whose score is -inf has no weight, wherever its channel and its product are.
    for at, channel in ((5, 0), (40, dim - 1), (66, dim // 2)):
        q[:, :, channel], k[at, :, channel] = 1, -torch.inf
    out, _ = run(make_paged([(q, k, v)], "strided", 16), DENSE, "triton")
    seen = causal_mask(33, 100)
    seen[..., [5, 40, 66]] = False
    k[[5, 40, 66]] = 0
    assert_accurate(out, (q, k, v), seen)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 2), (7, 1), (8, 1)])
def test_every_group_over_the_tiles_that_are_selected(heads: int, kv_heads: int) -> None:
    policies = (MIXED * 4)[:heads]
    qkv = make_qkv(heads, 100, 260, heads, kv_heads)
    paged = make_paged([qkv], "strided", 64)
    tiles = select_tiles(*paged.tensors, policies, kv_layout="strided", impl="triton")
    out, stats = run(paged, policies, "triton")
    assert_accurate(out, qkv, element_mask(tiles))
    assert (stats.tiles_computed, stats.tiles_causal) == (tiles.computed, tiles.causal)
    assert stats.tiles_computed < stats.tiles_causal


@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_ragged_requests_over_shuffled_pages(block_size: int) -> None:
    shapes = [(1, 1), (1, 140), (64, 64), (5, 68)]
    batch = [make_qkv(r, *shape, 2, 1) for r, shape in enumerate(shapes)]
    paged = make_paged(batch, "strided", block_size)
    out, _ = run(paged, MIXED, "triton")
    for r, qkv in enumerate(batch):
        tiles = select_tiles(*paged.tensors, MIXED, request=r, kv_layout="strided", impl="triton")
        rows = slice(int(paged.query_start_loc[r]), int(paged.query_start_loc[r + 1]))
        assert_accurate(out[rows], qkv, element_mask(tiles))


def test_the_rows_of_other_requests_are_left_alone_and_change_nothing() -> None:
    batch = [make_qkv(r, 40, 100, 2, 1) for r in range(3)]
    paged = make_paged(batch, "strided", 32)
    out, _ = run(paged, MIXED, "triton", requests=[1])
    assert out[:40].isnan().all()
    assert out[80:].isnan().all()
    alone, _ = run(make_paged(batch[1:2], "strided", 32, seed=5), MIXED, "triton")
    assert torch.equal(out[40:80], alone)


def test_requests_share_the_pages_of_a_prefix() -> None:
    q, k, v = make_qkv(1, 100, 100, 2, 1)
    paged = make_paged([(q, k, v), (q[64:], k, v)], "strided", 32)
    paged.block_table[1, :2] = paged.block_table[0, :2]
    out, _ = run(paged, DENSE, "triton")
    torch.testing.assert_close(out[64:100], out[100:])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_any_strides_of_the_cache(order: tuple[int, ...]) -> None:
    paged = make_paged([make_qkv(2, 40, 100, 4, 2)], "strided", 32)
    expected, _ = run(paged, DENSE, "triton")
    cache = paged.kv_cache
    inverse = [order.index(axis) for axis in range(4)]
    moved = cache.permute(order).contiguous().permute(inverse)
    assert moved.shape == cache.shape
    out, _ = run(type(paged)(paged.q, moved, *paged.tensors[2:], "strided"), DENSE, "triton")
    assert torch.equal(out, expected)


def test_a_page_beyond_the_reach_of_32_bits() -> None:
    q, k, v = make_qkv(3, 20, 20, 1, 1, 64, torch.float16)
    width = 16 * 128
    far = 2**31 // width + 7  # whose first element has an offset above 2^31
    cache = torch.empty(far + 1, 1, 16, 128, dtype=torch.float16)  # of which two pages are touched
    near = make_paged([(q, k, v)], "strided", 16)
    own = near.block_table[0, :2].long()
    cache[[far, 3]] = near.kv_cache[own]
    table = torch.tensor([[far, 3]], dtype=torch.int32)
    paged = type(near)(q, cache, table, *near.tensors[3:], "strided")
    policy = Sale(sink=1, local=0, tau=0.5, tail=0)
    out, _ = run(paged, policy, "triton")
    expected, _ = run(near, policy, "triton")
    assert torch.equal(out, expected)


def test_waves_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = make_paged([make_qkv(4, 150, 150, 2, 1)], "strided", 32)
    expected, stats = run(paged, MIXED, "triton")
    monkeypatch.setattr(launches, "LIST_BYTES", 1)
    out, again = run(paged, MIXED, "triton")
    assert torch.equal(out, expected)
    assert stats.tiles_computed == again.tiles_computed


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (4, 4)])
def test_no_more_memory_than_was_said(
    heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "LIST_BYTES", 1)
    paged = make_paged([make_qkv(8, 70, 600, heads, kv_heads)], "strided", 32)
    with Taken() as mode:
        run(paged, Sale(), "triton")
    said = launches.workspace(70, 600, heads, kv_heads, 64)
    assert said / 2 < mode.peak <= said


def test_codes_of_another_width_are_not_held_beside_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launches, "LIST_BYTES", 1)
    paged = make_paged([make_qkv(8, 16, 6000, 2, 2)], "strided", 32)
    with Taken() as mode:
        run(paged, [Sale(bits=6), Sale(bits=8)], "triton")
    codes = 2 * 6144 * 64  # of both kv heads' keys, one byte a number
    assert codes < mode.peak < 2 * codes


def test_a_request_without_rows_has_no_tiles() -> None:
    paged = make_paged([make_qkv(6, 0, 100, 2, 1), make_qkv(6, 10, 100, 2, 1)], "strided", 32)
    tiles = select_tiles(*paged.tensors, Sale(), kv_layout="strided", impl="triton")
    assert (tiles.query_len, tiles.computed) == (0, [0, 0])


def test_values_that_are_not_finite_reach_no_q_block_before_them() -> None:
    q, k, v = make_qkv(5, 80, 80, 1, 1)
    v[70] = torch.nan
    out, _ = run(make_paged([(q, k, v)], "strided", 16), DENSE, "triton")
    assert out[:64].isfinite().all()
    assert out[70:].isnan().all()


def test_policies_are_followed_from_their_context_on() -> None:
    table = PolicyTable([Static(sink=16, local=0)] * 2, [100, 200])
    assert PolicyTable([DENSE], [2**32]).dense_below == [2**31 - 1]
    for length, whole in ((99, [True, True]), (100, [False, True]), (200, [False, False])):
        _, stats = run(make_paged([make_qkv(6, 10, length, 2, 1)], "strided", 32), table, "triton")
        assert [density == 1 for density in stats.density] == whole


def test_plain_tensors() -> None:
    qkv = make_qkv(7, 50, 90, 2, 1)
    out, _ = sparse_attention(*qkv, DENSE, impl="triton")
    assert_accurate(out, qkv, causal_mask(50, 90))
    none, stats = sparse_attention(qkv[0][:0], *qkv[1:], DENSE, impl="triton")
    assert none.shape == (0, 2, 64)
    assert stats.density == [1.0, 1.0]
