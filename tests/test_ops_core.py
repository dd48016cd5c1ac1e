"""The compiled core's attention against float64, on every instruction set it can run here."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from _attention import (
    DTYPES,
    HEAD_DIMS,
    QKV,
    Paged,
    assert_accurate,
    causal_mask,
    element_mask,
    make_paged,
    make_qkv,
    needs_core,
    run,
)
from _tiles import assert_same_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.ops import select_tiles, sparse_attention
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.selection import DENSE, Sale, Static

pytestmark = needs_core

KEEP_ALL = (DENSE, Sale(tau=0.0))
RAGGED = [(1, 1), (15, 17), (63, 129), (64, 64), (65, 130), (100, 163), (1, 200)]
MIXED = (
    DENSE,
    Static(sink=20, local=40, growth=0.1, tile=32),
    Sale(sink=16, local=32, growth=0.1, tau=0.05, tail=10, tau_slope=-0.25),
    Sale(sink=1, local=0, tau=0.02, bits=4, tile=64, row_stride=1),
)


def ragged(seed: int, shapes: list[tuple[int, int]], **sizes: Any) -> list[QKV]:
    return [make_qkv(seed + i, rows, length, **sizes) for i, (rows, length) in enumerate(shapes)]


def assert_dense(paged: Paged, batch: list[QKV], out: torch.Tensor) -> None:
    """Each request's rows of ``out`` are dense attention, to the budget."""
    for r, qkv in enumerate(batch):
        rows = slice(*paged.query_start_loc[r : r + 2].tolist())
        assert_accurate(out[rows], qkv, causal_mask(len(qkv[0]), len(qkv[1])))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_all_is_dense_attention(isa: str, dim: int, dtype: torch.dtype) -> None:
    layouts = [("vec", 32), ("vec16", 48), ("vec", 64), ("vec", 96), ("vec", 128), ("vec16", 16)]
    if dtype == torch.bfloat16:
        layouts += [("amx", 32), ("amx", 64), ("amx", 96), ("amx", 128)]
    groups = (1, 2, 3, 4, 8)
    for i, (kv_layout, block_size) in enumerate(layouts):
        group = groups[(i + HEAD_DIMS.index(dim)) % len(groups)]
        kv_heads = 1 if group == 8 else 2
        batch = ragged(i, RAGGED, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
        paged = make_paged(batch, kv_layout, block_size, seed=i)
        policies = [KEEP_ALL[head % 2] for head in range(group * kv_heads)]
        out, stats = run(paged, policies, "cpu")
        assert_dense(paged, batch, out)
        assert stats.tiles_computed == stats.tiles_causal
        # A request is accurate in a batch of its own, too, however many q heads share a kv head.
        one = make_paged(batch[-2:-1], kv_layout, block_size)
        assert_dense(one, batch[-2:-1], run(one, policies, "cpu")[0])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_the_chosen_tiles(isa: str, group: int, dtype: torch.dtype) -> None:
    policies = [MIXED[head % 4] for head in range(group * 2)]
    batch = ragged(20, [(300, 300), (77, 391)], heads=group * 2, dtype=dtype)
    paged = make_paged(batch, "vec", 64)
    out, stats = run(paged, policies, "cpu")
    computed, causal = [0] * len(policies), [0] * len(policies)
    for r, qkv in enumerate(batch):
        tiles = select_tiles(*paged.tensors, policies, request=r, impl="cpu")
        rows = slice(*paged.query_start_loc[r : r + 2].tolist())
        assert_accurate(out[rows], qkv, element_mask(tiles))
        computed = [a + b for a, b in zip(computed, tiles.computed, strict=True)]
        causal = [a + b for a, b in zip(causal, tiles.causal, strict=True)]
    assert (stats.tiles_computed, stats.tiles_causal) == (computed, causal)
    assert group == 1 or min(stats.density[1:]) < 0.9, "the case shows nothing"
    assert stats.select_seconds > 0
    assert stats.attend_seconds > 0


def test_instruction_sets_differ_where_they_must() -> None:
    """Evidence that the path asked for is the one that ran.

    bf16 products round the softmax weights to bf16, fp32 ones do not; 8 and 16 lanes add in
    another order. (What each path is compiled from is looked at in test_build.py.)
    """
    usable = [name for name, ok in core.isas().items() if ok]
    outs: dict[tuple[str, torch.dtype], torch.Tensor] = {}
    for dtype in DTYPES:
        paged = make_paged([make_qkv(1, 200, 300, dtype=dtype)])
        for name in usable:
            core.set_isa(name)
            outs[name, dtype] = run(paged, DENSE, "cpu")[0]
    core.set_isa(None)
    assert core.active_isa() == usable[0]
    if "avx512_bf16" in usable:
        assert not torch.equal(
            outs["avx512_bf16", torch.bfloat16], outs["avx512_vnni", torch.bfloat16]
        )
    if "avx512" in usable:
        assert not torch.equal(outs["avx512", torch.float32], outs["avx2", torch.float32])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("chunk", [1, 50, 64, 100, 256])
def test_chunks_of_a_prompt_are_as_accurate_as_the_whole(chunk: int, impl: str) -> None:
    q, k, v = make_qkv(2, 330, 330)
    for policy in (DENSE, Sale(sink=16, local=16, tau=0.02)):
        # One token at a time shows what there is to show near an edge between q blocks.
        starts = range(100, 140) if chunk == 1 else range(0, 330, chunk)
        for start in starts:
            end = min(start + chunk, 330)
            qkv = (q[start:end], k[:end], v[:end])
            paged = make_paged([qkv], block_size=32)
            out, _ = run(paged, policy, impl)
            tiles = select_tiles(*paged.tensors, policy, impl=impl)
            assert_accurate(out, qkv, element_mask(tiles))
            if policy == DENSE:
                assert_accurate(out, qkv, causal_mask(len(out), end))


@pytest.mark.parametrize("chunk", [50, 64, 100, 256])
def test_static_tiles_do_not_move_with_the_chunks(chunk: int) -> None:
    q, k, v = make_qkv(2, 330, 330)
    policy = Static(sink=20, local=50, tile=32)
    whole, _ = sparse_attention(q, k, v, policy, impl="cpu")
    for start in range(0, 330, chunk):
        end = min(start + chunk, 330)
        part, _ = sparse_attention(q[start:end], k[:end], v[:end], policy, impl="cpu")
        assert torch.equal(part, whole[start:end])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_chunk_in_a_prompts_midst_has_no_tail(impl: str) -> None:
    q, k, v = make_qkv(5, 128, 700)
    policy = Sale(sink=16, local=16, tau=0.02)

    def computed(prompt: int | None) -> list[int]:
        return sparse_attention(q, k, v, policy, impl=impl, prompt_len=prompt)[1].tiles_computed

    assert computed(700) == computed(None)
    assert all(fewer < more for fewer, more in zip(computed(5000), computed(700), strict=True))


def test_an_empty_query_is_no_work() -> None:
    q, k, v = nothing = make_qkv(3, 0, 100)
    out, stats = sparse_attention(q, k, v, impl="cpu")
    assert out.shape == (0, 4, 64)
    assert stats.tiles_causal == [0] * 4
    assert stats.density == [1.0] * 4
    request = make_qkv(4, 70, 70)
    out, _ = run(make_paged([nothing, request, (q, k[:0], v[:0])]), DENSE, "cpu")
    assert_accurate(out, request, causal_mask(70, 70))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_about_every_edge(length: int, dtype: torch.dtype) -> None:
    batch = ragged(6, [(length, length), (1, length)], heads=6, dtype=dtype)
    paged = make_paged(batch, "vec", 64)
    assert_dense(paged, batch, run(paged, KEEP_ALL * 3, "cpu")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_q_blocks_that_go_in_pairs(isa: str, dtype: torch.dtype) -> None:
    # Those of 1024 rows or more of at least 8192 tokens; 18 here, the first and last in part.
    qkv = make_qkv(8, 1100, 8303, heads=4, kv_heads=1, dtype=dtype)
    paged = make_paged([qkv])
    tiles, other = (select_tiles(*paged.tensors, MIXED, impl=impl) for impl in ("cpu", "reference"))
    assert_same_tiles(tiles, other, qkv, MIXED, 64**-0.5)
    out, stats = run(paged, MIXED, "cpu")
    assert (stats.tiles_computed, stats.tiles_causal) == (tiles.computed, tiles.causal)
    assert_accurate(out, qkv, element_mask(tiles))


THREADS = (1, 2, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    batch = ragged(7, [(300, 500), (64, 64), (1100, 8250), (130, 200)], heads=8, dtype=dtype)
    paged = make_paged(batch)
    before = torch.get_num_threads()
    omp = ctypes.CDLL("libgomp.so.1")  # torch's: the core shares its pool
    results = []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert omp.omp_get_max_threads() == threads
            out, stats = run(paged, MIXED * 2, "cpu")
            results.append((out, stats.tiles_computed, stats.tiles_causal))
    finally:
        torch.set_num_threads(before)
    for out, *counts in results[1:]:
        assert torch.equal(out, results[0][0])
        assert counts == list(results[0][1:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_batch_is_dense_attention(data: st.DataObject) -> None:
    """Shapes, sizes and layouts that nobody thought of; every request also by itself."""
    dtype = data.draw(st.sampled_from(DTYPES))
    group, kv_heads = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    dim = data.draw(st.sampled_from(HEAD_DIMS))
    kv_layout = data.draw(st.sampled_from(["vec", "vec16", "amx"][: 2 + (dtype == DTYPES[0])]))
    block_size = data.draw(st.integers(1, 4)) * (16 if kv_layout == "vec16" else 32)
    lengths = data.draw(st.lists(st.integers(1, 260), min_size=1, max_size=4))
    shapes = [(data.draw(st.integers(1, min(length, 150))), length) for length in lengths]
    scale = data.draw(st.sampled_from([None, 0.01, 0.3]))
    isa = data.draw(st.sampled_from([name for name, ok in core.isas().items() if ok]))
    batch = ragged(8, shapes, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    paged = make_paged(batch, kv_layout, block_size, seed=len(shapes))
    core.set_isa(isa)
    try:
        out, _ = run(paged, data.draw(st.sampled_from(KEEP_ALL)), "cpu", scale=scale)
        for r, qkv in enumerate(batch):
            rows = slice(*paged.query_start_loc[r : r + 2].tolist())
            assert_accurate(out[rows], qkv, causal_mask(*shapes[r]), scale)
            alone, _ = run(make_paged([qkv], kv_layout, block_size), DENSE, "cpu", scale=scale)
            assert torch.equal(alone, out[rows])
    finally:
        core.set_isa(None)
