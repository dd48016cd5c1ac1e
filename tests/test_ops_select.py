"""The core's selectors against the reference's, and what a selector owes whatever computes it."""

from __future__ import annotations

import itertools

import pytest
import torch
from _attention import BITS, DTYPES, IMPLS, Paged, make_paged, make_qkv, needs_core, run
from _tiles import assert_same_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.ops import PolicyTable, TileList, select_tiles
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Bits, Mass, Sale, Static

SHAPES = [(1, 1), (64, 64), (65, 400), (1, 400), (100, 463), (700, 700), (500, 1203)]
TAUS = (0.0, 0.001, 0.01, 0.05, 0.2, 1.0)


def both(paged: Paged, policies: object, request: int = 0) -> tuple[TileList, TileList]:
    own, other = (
        select_tiles(
            *paged.tensors,
            policies,  # type: ignore[arg-type]
            request=request,
            kv_layout=paged.kv_layout,
            impl=impl,
        )
        for impl in ("cpu", "reference")
    )
    return own, other


@needs_core
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_core_chooses_the_tiles_of_the_reference(
    isa: str, bits: Bits, tile: int, dtype: torch.dtype
) -> None:
    policies: list[Sale | Mass | Static] = [
        selector(
            sink=s, local=n, growth=growth, tau=tau, bits=bits, tile=tile, row_stride=stride, tail=n
        )
        for (s, n), growth, tau, stride, selector in zip(
            [(1, 0), (20, 33), (64, 256), (16, 64), (100, 1)] * 2,
            itertools.cycle([0.0, 0.0, 0.1]),
            [0.0, 0.005, 0.02, 0.1, 0.5] * 2,
            itertools.cycle([1, 2, 4, 8]),
            itertools.cycle([Sale, Mass, Mass]),
            strict=False,
        )
    ]
    policies += [
        Static(sink=17, local=50, growth=0.2, tile=tile),  # type: ignore[arg-type]
        Static(sink=1, local=0, tile=tile),  # type: ignore[arg-type]
    ]
    dim = {16: 64, 32: 80, 64: 128}[tile]
    batch = [make_qkv(r, *shape, len(policies), 3, dim, dtype) for r, shape in enumerate(SHAPES)]
    kv_layout = "amx" if dtype == torch.bfloat16 and bits == 4 else "vec"
    paged = make_paged(batch, kv_layout, 64)
    kept = dropped = ties = 0
    for r, qkv in enumerate(batch):
        own, other = both(paged, policies, r)
        ties += assert_same_tiles(own, other, qkv, policies, dim**-0.5)
        kept, dropped = kept + sum(own.computed), dropped + sum(own.causal) - sum(own.computed)
    assert kept > 1000 / tile
    assert dropped > 1000 / tile
    assert ties < 0.001 * (kept + dropped)


@needs_core
@pytest.mark.parametrize("selector", [Sale, Mass])
@pytest.mark.parametrize("bits", BITS)
def test_every_head_dim_and_layout(isa: str, bits: Bits, selector: type[Sale | Mass]) -> None:
    policies = [selector(sink=16, local=16, tau=0.05, bits=bits)] * 4
    for dim, (kv_layout, block_size), dtype in zip(
        core.HEAD_DIMS,
        [
            ("vec", 32),
            ("amx", 96),
            ("vec16", 48),
            ("amx", 128),
            ("vec16", 16),
            ("vec", 96),
            ("amx", 32),
        ],
        [DTYPES[2], DTYPES[0], DTYPES[1], DTYPES[0], DTYPES[1], DTYPES[2], DTYPES[0]],
        strict=True,
    ):
        qkv = make_qkv(dim, 150, 420, 4, 2, dim, dtype)
        paged = make_paged([qkv], kv_layout, block_size)
        own, other = both(paged, policies)
        assert_same_tiles(own, other, qkv, policies, dim**-0.5)
        assert 0.1 < sum(own.computed) / sum(own.causal) < 0.95


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selector", [Sale, Mass])
def test_lowering_a_threshold_drops_no_tile(
    impl: str, dtype: torch.dtype, selector: type[Sale | Mass]
) -> None:
    paged = make_paged([make_qkv(9, 333, 800, 6, 2, 64, dtype)])
    for bits, tile, stride in ((4, 16, 4), (8, 16, 1), (6, 64, 4), ("fp4", 32, 8)):
        counts = []
        wider: TileList | None = None
        for tau in TAUS:
            policy = selector(local=64, tau=tau, bits=bits, tile=tile, row_stride=stride, tail=40)  # type: ignore[arg-type]
            tiles = select_tiles(*paged.tensors, policy, impl=impl)
            for head in range(6 if wider is not None else 0):
                assert not (tiles.mask(head) & ~wider.mask(head)).any()  # type: ignore[union-attr]
            wider = tiles
            counts.append(sum(tiles.computed))
        assert counts[0] == sum(tiles.causal)
        assert len(set(counts)) >= 4, "the case shows nothing"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("selector", [Sale, Mass])
def test_scoring_more_rows_drops_no_tile(impl: str, selector: type[Sale | Mass]) -> None:
    paged = make_paged([make_qkv(10, 500, 500)])
    amounts = [(8, 0), (8, 100), (8, 300), (1, 0)]  # row_stride, tail
    policies = [selector(sink=16, local=64, row_stride=s, tail=t) for s, t in amounts]  # type: ignore[arg-type]
    masks = [select_tiles(*paged.tensors, policy, impl=impl).mask(0) for policy in policies]
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@needs_core
def test_any_policies_choose_the_tiles_of_the_reference(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 900))
    rows = data.draw(st.integers(1, min(length, 300)))
    dtype = data.draw(st.sampled_from(DTYPES))
    tile = st.sampled_from([16, 32, 64])
    sinks, locals_ = st.integers(1, 200), st.integers(0, 300)
    selector = data.draw(st.sampled_from([Sale, Mass]))
    policy = st.one_of(
        st.just(DENSE),
        st.builds(Static, sink=sinks, local=locals_, tile=tile, growth=st.floats(0, 1)),
        st.builds(
            selector,
            sink=sinks,
            local=locals_,
            tile=tile,
            tau=st.floats(0, 1),
            tau_slope=st.sampled_from([0.0, -2.0, -0.3, 0.7, 2.0]),
            bits=st.sampled_from(BITS),
            row_stride=st.sampled_from([1, 2, 4, 8]),
            tail=st.integers(0, 150),
        ),
    )
    policies = data.draw(st.lists(policy, min_size=4, max_size=4))
    qkv = make_qkv(data.draw(st.integers(0, 1000)), rows, length, dtype=dtype)
    scale = data.draw(st.sampled_from([0.125, 0.03, 0.5]))
    core.set_isa(data.draw(st.sampled_from([name for name, ok in core.isas().items() if ok])))
    try:
        paged = make_paged([qkv], "vec", 32 * data.draw(st.integers(1, 4)))
        own, other = (
            select_tiles(*paged.tensors, policies, scale=scale, impl=impl)
            for impl in ("cpu", "reference")
        )
        assert_same_tiles(own, other, qkv, policies, scale)
        _, stats = run(paged, policies, "cpu", scale=scale)
        assert (stats.tiles_computed, stats.tiles_causal) == (own.computed, own.causal)
    finally:
        core.set_isa(None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("selector", [Sale, Mass])
def test_keys_and_queries_that_are_not_finite_keep_tiles(
    impl: str, poison: float, selector: type[Sale | Mass]
) -> None:
    policy = selector(sink=16, local=0, tau=1.0)
    causal = [4, 8, 12, 16]
    for where, hit in (("q", slice(2, 3)), ("k", slice(0, 4))):
        q, k, v = make_qkv(3, 256, 256, heads=1, kv_heads=1)
        (q if where == "q" else k)[128, 0, 5] = poison
        tiles = select_tiles(*make_paged([(q, k, v)]).tensors, policy, impl=impl)
        assert tiles.mask(0)[hit].sum(1).tolist() == causal[hit]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [1.0, -3.0])
@pytest.mark.parametrize("bits", BITS)
def test_constant_keys(impl: str, value: float, bits: Bits) -> None:
    q, k, v = make_qkv(4, 300, 300, heads=1, kv_heads=1)
    k.fill_(value)
    # All scores of a row are one value: exp(s - m) / l = 1 / l, with 16 to 80 keys in l.
    for tau, everything in ((0.5, False), (0.01, True)):
        policy = Sale(sink=16, local=0, tau=tau, bits=bits)
        out, stats = run(make_paged([(q, k, v)]), policy, impl)
        assert out.isfinite().all()
        assert (stats.density == [1.0]) is everything


@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_of_the_tail_is_scored(impl: str) -> None:
    q, k, v = torch.randn(3, 512, 1, 64, generator=torch.Generator().manual_seed(11))
    looking = {474: 100, 509: 180}  # row: key; neither is an 8th row
    for row, key in looking.items():
        k[key] = 2 * q[row]
    paged = make_paged([(q, k, v)])
    for tail, found in ((0, [False, False]), (16, [False, True]), (64, [True, True])):
        policy = Sale(sink=16, local=64, tau=0.5, row_stride=8, tail=tail)
        last = select_tiles(*paged.tensors, policy, impl=impl).row(0, 7).tolist()
        assert [key // 16 in last for key in looking.values()] == found


@pytest.mark.parametrize("impl", IMPLS)
def test_the_tail_of_a_chunk_is_what_it_has_of_the_prompts(impl: str) -> None:
    paged = make_paged([make_qkv(13, 150, 700), make_qkv(14, 200, 400)])
    policies = [
        selector(sink=16, local=16, tau=0.05, row_stride=8, tail=tail)
        for selector in (Sale, Mass)
        for tail in (128, 128 - 56, 0)
    ]
    tails = [
        [select_tiles(*paged.tensors, policy, request=r, impl=impl).tiles for policy in policies]
        for r in range(2)
    ]
    for ahead, same_as in ((0, 0), (56, 1), (128, 2), (9000, 2)):
        prompts = torch.tensor([700 + ahead, 400 + ahead], dtype=torch.int32)
        for r, place in itertools.product(range(2), (0, 3)):
            chunk = select_tiles(
                *paged.tensors, policies[place], request=r, prompt_lens=prompts, impl=impl
            )
            assert chunk.tiles.tolist() == tails[r][place + same_as].tolist()
            assert len(tails[r][place]) > len(tails[r][place + 1]) > len(tails[r][place + 2])


@pytest.mark.parametrize("impl", IMPLS)
def test_policies_are_followed_from_their_context_on(impl: str) -> None:
    rows: list[AnyPolicy] = [
        Static(sink=16, local=16),
        Sale(sink=16, local=16, tau=0.5),
        DENSE,
        Mass(tile=64),
    ]
    for length, dense in ((399, [0, 1, 2, 3]), (400, [1, 2, 3]), (600, [2])):
        table = PolicyTable(rows, [400, 500, 0, 500])
        paged = make_paged([make_qkv(12, 300, length)])
        tiles = select_tiles(*paged.tensors, table, impl=impl)
        counts = zip(tiles.computed, tiles.causal, strict=True)
        assert [h for h, (computed, causal) in enumerate(counts) if computed == causal] == dense
        assert tiles.tile_sizes == (16, 16, 16, 64)
