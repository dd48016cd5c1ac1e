"""Selection in Triton, interpreted, against the reference's: the same tiles, but for ties."""

from __future__ import annotations

import itertools

import pytest
import torch
from _attention import BITS, DTYPES, Paged, make_paged, make_qkv, run
from _tiles import assert_same_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.ops import PolicyTable, TileList, select_tiles
from vllm_sparse_backend.ops.triton import run as launches
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Bits, Mass, Sale, Static


def both(
    paged: Paged, policies: object, scale: float | None = None, prompt_len: int | None = None
) -> tuple[TileList, TileList]:
    own, other = (
        select_tiles(
            *paged.tensors,
            policies,  # type: ignore[arg-type]
            scale=scale,
            prompt_lens=None if prompt_len is None else torch.tensor([prompt_len]).int(),
            kv_layout="strided",
            impl=impl,
        )
        for impl in ("triton", "reference")
    )
    return own, other


# Every pair of a tile and a dtype, and every number of bits with each of both.
@pytest.mark.parametrize(
    ("bits", "tile", "dtype"),
    [
        *(
            ((4, 6, 8)[(i + j) % 3], tile, dtype)
            for i, tile in enumerate((16, 32, 64))
            for j, dtype in enumerate(DTYPES)
        ),
        ("fp4", 16, torch.float16),
        ("fp4", 32, torch.bfloat16),
        ("fp4", 64, torch.float32),
    ],
)
def test_the_tiles_of_the_reference(bits: Bits, tile: int, dtype: torch.dtype) -> None:
    policies: list[Sale | Mass | Static] = [
        selector(sink=s, local=n, tau=tau, bits=bits, tile=tile, row_stride=stride, tail=tail)
        for (s, n), tau, stride, selector, tail in zip(
            [(1, 0), (20, 33), (64, 64)],
            [0.02, 0.05, 0.01],
            [4, 1, 8],
            itertools.cycle([Sale, Mass]),
            [0, 20, 100],
            strict=False,
        )
    ]
    dim = {16: 64, 32: 80, 64: 128}[tile]
    qkv = make_qkv(tile, 150, 400, 3, 1, dim, dtype)
    own, other = both(make_paged([qkv], "strided", 32), policies)
    assert_same_tiles(own, other, qkv, policies, dim**-0.5)
    assert sum(own.computed) < sum(own.causal)


# All the ways in which keys are put in columns, and rows of q blocks together.
@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("group", [1, 4])
def test_however_an_architecture_divides_a_product(
    arch: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "architecture", lambda: arch)
    heads = 2 * group
    policies: list[AnyPolicy] = [
        selector(sink=16, local=16, tau=0.03, tile=tile, tail=30)
        for selector, tile in itertools.islice(
            itertools.cycle([(Sale, 16), (Mass, 16), (Sale, 64), (Mass, 32)]), heads
        )
    ]
    qkv = make_qkv(group, 330, 600, heads, 2)
    own, other = both(make_paged([qkv], "strided", 32), policies, prompt_len=620)
    assert_same_tiles(own, other, qkv, policies, 0.125, 620)
    assert sum(own.computed) < sum(own.causal)


# Heads of a group that are scored together, and no power of two; from 192 channels on, fewer.
@pytest.mark.parametrize(("dim", "group"), [(96, 5), (112, 6), (64, 7), (192, 6), (256, 7)])
def test_every_other_head_dim_and_group(dim: int, group: int) -> None:
    policies: list[AnyPolicy] = [
        selector(sink=16, local=16, tau=0.03, tile=tile, tail=10, bits=bits)
        for selector, tile, bits in itertools.islice(
            itertools.cycle([(Sale, 16, 6), (Mass, 32, 6), (Sale, 64, "fp4")]), 2 * group
        )
    ]
    qkv = make_qkv(dim, 80, 300, 2 * group, 2, dim)
    own, other = both(make_paged([qkv], "strided", 16), policies)
    assert_same_tiles(own, other, qkv, policies, dim**-0.5)
    assert 0.1 < sum(own.computed) / sum(own.causal) < 0.9


@pytest.mark.parametrize(("dim", "group"), [(128, 8), (256, 8)])
def test_eight_heads_of_a_group(dim: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[AnyPolicy] = [Sale(sink=16, local=16, tau=0.03, tail=10)] * 4
    policies += [Mass(sink=16, local=16, tau=0.03, tail=10)] * 4
    qkv = make_qkv(dim, 80, 300, group, 1, dim)
    for arch in ("sm_90", "sm_103"):  # where that are eight together, and four
        monkeypatch.setattr(launches, "architecture", lambda arch=arch: arch)
        own, other = both(make_paged([qkv], "strided", 16), policies)
        assert_same_tiles(own, other, qkv, policies, dim**-0.5)
        assert 0.1 < sum(own.computed) / sum(own.causal) < 0.9


def test_requests_share_the_pages_of_a_prefix() -> None:
    policies: list[AnyPolicy] = [
        Sale(sink=16, local=16, tau=0.05, tail=0),
        Mass(sink=16, local=16, tau=0.05, tile=64, tail=0),
        Static(sink=16, local=32),
        Sale(sink=16, local=0, tau=0.1, tail=0, bits="fp4", tile=32),
    ]
    q, k, v = make_qkv(1, 200, 400)
    other = make_qkv(2, 100, 420)
    k2, v2 = (torch.cat([x[:256], y[256:]]) for x, y in ((k, other[1]), (v, other[2])))
    batch = [(q, k, v), (other[0], k2, v2)]
    paged = make_paged(batch, "strided", 32)
    paged.block_table[1, :8] = paged.block_table[0, :8]
    want = make_paged(batch, "strided", 32)  # each with pages of its own
    out, stats = run(paged, policies, "triton")
    expected, _ = run(want, policies, "triton")
    assert torch.equal(out, expected)
    assert sum(stats.tiles_computed) < 0.9 * sum(stats.tiles_causal)
    for request, qkv in enumerate(batch):
        own, reference = (
            select_tiles(*paged.tensors, policies, request=request, kv_layout="strided", impl=impl)
            for impl in ("triton", "reference")
        )
        assert_same_tiles(own, reference, qkv, policies, 0.125)


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])  # a product's keys as they come; in parts
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 2), (128, 4)])
def test_4_bit_floats_two_in_a_byte(
    arch: str, dim: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = 2 * group
    policies: list[AnyPolicy] = [
        selector(sink=16, local=16, tau=0.03, tile=tile, tail=30, bits=bits)
        for selector, tile, bits in itertools.islice(
            itertools.cycle([(Sale, 16, "fp4"), (Mass, 32, "fp4"), (Sale, 64, 6)]), heads
        )
    ]
    qkv = make_qkv(dim, 130, 600, heads, 2, dim)
    paged = make_paged([qkv], "strided", 32)
    as_integers, wanted = both(paged, policies)
    monkeypatch.setattr(launches, "architecture", lambda: arch)
    packed, _ = both(paged, policies)
    assert_same_tiles(packed, wanted, qkv, policies, dim**-0.5)
    for head in range(heads):  # their products are the same numbers
        assert torch.equal(packed.mask(head), as_integers.mask(head))
    assert 0.1 < sum(packed.computed) / sum(packed.causal) < 0.9


def test_a_chunk_before_a_prompts_last_has_no_tail() -> None:
    policies: list[AnyPolicy] = [
        selector(sink=16, local=16, tau=0.05, row_stride=8) for selector in (Sale, Mass, Sale, Mass)
    ]
    qkv = make_qkv(13, 150, 700)
    paged = make_paged([qkv], "strided", 64)
    counts = []
    for prompt_len in (700, 756, 828, 9000):
        own, other = both(paged, policies, prompt_len=prompt_len)
        assert_same_tiles(own, other, qkv, policies, 0.125, prompt_len)
        counts.append(sum(own.computed))
    assert counts[0] > counts[1] > counts[2] == counts[3]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_policies(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 400))
    rows = data.draw(st.integers(1, min(length, 100)))
    tile = st.sampled_from([16, 32, 64])
    sinks, locals_ = st.integers(1, 100), st.integers(0, 150)
    window = dict(sink=sinks, local=locals_, tile=tile, growth=st.floats(0, 1))
    scored = dict(
        **window,
        tau=st.floats(0, 1),
        tau_slope=st.sampled_from([0.0, -2.0, 0.7]),
        bits=st.sampled_from(BITS),
        row_stride=st.sampled_from([1, 2, 4, 8]),
        tail=st.integers(0, 100),
    )
    policy = st.one_of(
        st.just(DENSE),
        st.builds(Static, **window),
        st.builds(Sale, **scored),
        st.builds(Mass, **scored),
    )
    policies = data.draw(st.lists(policy, min_size=4, max_size=4))
    qkv = make_qkv(data.draw(st.integers(0, 1000)), rows, length)
    scale = data.draw(st.sampled_from([0.125, 0.03, 0.5]))
    own, other = both(make_paged([qkv], "strided", 16), policies, scale)
    assert_same_tiles(own, other, qkv, policies, scale)


def test_a_context_of_several_words() -> None:
    policies: list[AnyPolicy] = [
        Mass(sink=16, local=64, tau=0.02, tail=0),
        Sale(sink=600, local=64, tau=0.02, tail=0),
    ]
    qkv = make_qkv(1, 64, 1150, 2, 1)
    own, other = both(make_paged([qkv], "strided", 128), policies)
    assert_same_tiles(own, other, qkv, policies, 0.125)
    assert 0.1 < sum(own.computed) / sum(own.causal) < 0.9


@pytest.mark.parametrize("selector", [Sale, Mass])
def test_lowering_a_threshold_drops_no_tile(selector: type[Sale | Mass]) -> None:
    paged = make_paged([make_qkv(9, 64, 300, 2, 1)], "strided", 64)
    counts = []
    wider: TileList | None = None
    for tau in (0.0, 0.01, 0.2):
        policy = selector(sink=16, local=16, tau=tau, tail=0)
        tiles = select_tiles(*paged.tensors, policy, kv_layout="strided", impl="triton")
        for head in range(2 if wider is not None else 0):
            assert not (tiles.mask(head) & ~wider.mask(head)).any()  # type: ignore[union-attr]
        wider = tiles
        counts.append(sum(tiles.computed))
    assert counts[0] == sum(tiles.causal)
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("selector", [Sale, Mass])
def test_keys_and_queries_that_are_not_finite_keep_tiles(
    poison: float, selector: type[Sale | Mass]
) -> None:
    policy = selector(sink=16, local=0, tau=1.0)
    causal = [4, 8, 12, 16]
    for where, hit in (("q", slice(2, 3)), ("k", slice(0, 4))):
        q, k, v = make_qkv(3, 256, 256, heads=1, kv_heads=1)
        (q if where == "q" else k)[128, 0, 5] = poison
        paged = make_paged([(q, k, v)], "strided", 64)
        tiles = select_tiles(*paged.tensors, policy, kv_layout="strided", impl="triton")
        assert tiles.mask(0)[hit].sum(1).tolist() == causal[hit]


def test_heads_follow_their_policies_from_their_context_on() -> None:
    rows: list[AnyPolicy] = [
        Static(sink=16, local=16),
        Sale(sink=16, local=16, tau=0.5, tail=0),
        DENSE,
        Mass(local=0, tile=64, tail=0),
    ]
    for length, dense in ((149, [0, 1, 2, 3]), (150, [1, 2, 3]), (300, [2])):
        table = PolicyTable(rows, [150, 200, 0, 200])
        paged = make_paged([make_qkv(12, 70, length)], "strided", 64)
        tiles = select_tiles(*paged.tensors, table, kv_layout="strided", impl="triton")
        counts = zip(tiles.computed, tiles.causal, strict=True)
        assert [h for h, (computed, causal) in enumerate(counts) if computed == causal] == dense
