"""The paged op: what changes nothing, what is not touched, and what it says of wrong arguments."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import (
    DTYPES,
    IMPLS,
    QKV,
    Paged,
    assert_accurate,
    causal_mask,
    make_paged,
    make_qkv,
    needs_core,
    run,
)

from vllm_sparse_backend.ops import (
    PolicyTable,
    paged_sparse_attention,
    select_tiles,
    sparse_attention,
)
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, Policy, Sale, Static

POLICIES: list[Policy] = [
    DENSE,
    Static(sink=20, local=40, tile=32),
    Sale(sink=16, local=32, tau=0.05, tail=10),
    Sale(sink=1, local=0, tau=0.02, bits=4, tile=64, row_stride=1),
]
SHAPES = [(130, 300), (64, 64), (1, 200), (77, 391)]


def batch_of(dtype: torch.dtype = torch.bfloat16) -> list[QKV]:
    return [make_qkv(30 + r, *shape, dtype=dtype) for r, shape in enumerate(SHAPES)]


def rows_of(paged: Paged, r: int) -> slice:
    return slice(*paged.query_start_loc[r : r + 2].tolist())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_the_batch_change_nothing(impl: str, dtype: torch.dtype) -> None:
    batch = batch_of(dtype)
    alone = [run(make_paged([qkv]), POLICIES, impl) for qkv in batch]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0]):
        paged = make_paged([batch[r] for r in order])
        out, stats = run(paged, POLICIES, impl)
        for place, r in enumerate(order):
            assert torch.equal(out[rows_of(paged, place)], alone[r][0])
        for head in range(4):
            assert stats.tiles_computed[head] == sum(
                alone[r][1].tiles_computed[head] for r in order
            )


@pytest.mark.parametrize("impl", IMPLS)
def test_pages_may_lie_anywhere(impl: str) -> None:
    for kv_layout, block_size in (("vec", 32), ("amx", 64), ("vec16", 48)):
        outs = [
            run(make_paged(batch_of(), kv_layout, block_size, seed), POLICIES, impl)[0]
            for seed in range(3)
        ]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_block_size_and_layout_change_nothing(impl: str) -> None:
    first, *others = (
        run(make_paged(batch_of(), kv_layout, block_size), POLICIES, impl)[0]
        for kv_layout, block_size in (
            ("vec", 128),
            ("vec16", 16),
            ("vec", 96),
            ("amx", 32),
            ("amx", 128),
        )
    )
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_pages_may_be_shared(impl: str) -> None:
    """Two requests with one prefix, and one request that has a page twice."""
    block = 64
    q, k, v = make_qkv(40, 100, 200)
    other, k2, v2 = make_qkv(41, 72, 200)
    k2[:128], v2[:128] = k[:128], v[:128]
    paged = make_paged([(q, k, v), (other, k2, v2)], block_size=block)
    table = paged.block_table.clone()
    table[1, :2] = table[0, :2]
    shared = dataclasses.replace(paged, block_table=table)
    assert torch.equal(run(paged, POLICIES, impl)[0], run(shared, POLICIES, impl)[0])

    k[64:128], v[64:128] = k[:64], v[:64]
    paged = make_paged([(q, k, v)], block_size=block)
    table = paged.block_table.clone()
    table[0, 1] = table[0, 0]
    twice = dataclasses.replace(paged, block_table=table)
    assert torch.equal(run(paged, POLICIES, impl)[0], run(twice, POLICIES, impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl: str) -> None:
    """q inside a fused projection, the cache a part of a larger one, a sliced block table."""
    q, k, v = make_qkv(42, 130, 300)
    paged = make_paged([(q, k, v)])
    wanted, _ = run(paged, POLICIES, impl)
    fused = torch.full((130, 6, 80), torch.nan, dtype=q.dtype)
    fused[:, 1:5, :64] = q
    blocks = paged.kv_cache.shape[0]
    large = torch.full((blocks, 3, 4, *paged.kv_cache.shape[2:]), torch.nan, dtype=q.dtype)
    large[:, 1, 1:3] = paged.kv_cache
    table = torch.full((1, 9), -7, dtype=torch.int32)
    table[:, 2:7] = paged.block_table[:, :5]
    strided = dataclasses.replace(
        paged,
        q=fused[:, 1:5, :64],
        kv_cache=large[:, 1, 1:3],
        block_table=table[:, 2:7],
    )
    assert torch.equal(run(strided, POLICIES, impl)[0], wanted)
    assert fused[:, 0].isnan().all()  # inputs are only read


@pytest.mark.parametrize("impl", IMPLS)
def test_requests_that_are_not_asked_for_are_not_touched(impl: str) -> None:
    paged = make_paged(batch_of())
    whole, _ = run(paged, POLICIES, impl)
    # They may be anything: longer than their pages, on pages that are none.
    paged.seq_lens[1] = 10**6
    paged.block_table[2] = -1
    out, _ = run(paged, POLICIES, impl, requests=[3, 0])
    fresh, _ = paged_sparse_attention(*paged.tensors, POLICIES, requests=[3, 0], impl=impl)
    for r in range(4):
        rows = rows_of(paged, r)
        if r in (0, 3):
            assert torch.equal(out[rows], whole[rows])
            assert torch.equal(fresh[rows], whole[rows])
        else:
            assert out[rows].isnan().all()
            assert not fresh[rows].any()
    out, stats = run(paged, POLICIES, impl, requests=[])
    assert out.isnan().all()
    assert stats.tiles_causal == [0] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_the_plain_op_is_the_paged_one(impl: str) -> None:
    q, k, v = make_qkv(43, 130, 300)
    wanted, stats = run(make_paged([(q, k, v)]), POLICIES, impl)
    written: tuple[Any, ...] = (
        POLICIES,
        PolicyTable.build(POLICIES, 4),
        [p.model_dump() for p in POLICIES],
    )
    for policies in written:
        out, own = sparse_attention(q, k, v, policies, impl=impl)
        assert torch.equal(out, wanted)
        assert own.tiles_computed == stats.tiles_computed
    default, _ = sparse_attention(q, k, v, impl=impl)
    assert torch.equal(default, sparse_attention(q, k, v, UNIFORM_DEFAULT, impl=impl)[0])
    # A strided k and v, too.
    k, v = torch.stack((k, v), dim=1).unbind(1)
    assert not k.is_contiguous()
    assert torch.equal(sparse_attention(q, k, v, POLICIES, impl=impl)[0], wanted)


@needs_core
def test_auto_is_the_core() -> None:
    qkv = make_qkv(44, 130, 300)
    auto, _ = sparse_attention(*qkv, DENSE)
    assert torch.equal(auto, sparse_attention(*qkv, DENSE, impl="cpu")[0])
    assert not torch.equal(auto, sparse_attention(*qkv, DENSE, impl="reference")[0])


@pytest.fixture
def other_library() -> Iterator[Callable[[Path], None]]:
    yield core.use_library
    core.use_library(None)


def test_a_missing_core_is_an_error_and_no_fallback(
    other_library: Callable[[Path], None], tmp_path: Path
) -> None:
    qkv = make_qkv(45, 70, 70)
    paged = make_paged([qkv])
    garbage = tmp_path / "_core.so"
    for message in ("is missing.*Install g\\+\\+", "does not load .*invalid ELF header"):
        other_library(garbage)
        for impl in ("cpu", "auto"):
            with pytest.raises(core.CoreUnavailable, match=message):
                sparse_attention(*qkv, impl=impl)
            with pytest.raises(core.CoreUnavailable, match=message):
                select_tiles(*paged.tensors, impl=impl)
        out, _ = sparse_attention(*qkv, DENSE, impl="reference")
        assert_accurate(out, qkv, causal_mask(70, 70))
        garbage.write_bytes(b"nothing to be loaded" * 100)


def change(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The arguments with some replaced: by what a function makes of the old, or by a value."""

    def apply(arguments: dict[str, Any]) -> dict[str, Any]:
        new = {n: c(arguments[n]) if callable(c) else c for n, c in changes.items()}
        return {**arguments, **new}

    return apply


WRONG = {
    "q: want a tensor on a GPU for impl 'triton', got one on cpu": change(impl="triton"),
    "impl: want one of .* got 'gpu'": change(impl="gpu"),
    "q: want .* got .*float64": change(q=lambda q: q.double()),
    r"q: want \[T, Hq, D\].* got \[130, 256\]": change(q=lambda q: q.flatten(1)),
    "q: want adjacent channels, got strides": change(q=lambda q: q.repeat(1, 1, 2)[..., ::2]),
    "q: want no gradient": change(q=lambda q: q.clone().requires_grad_()),
    r"kv_cache: want .*128\] torch.bfloat16 .*got .* torch.float16": change(
        kv_cache=lambda c: c.half()
    ),
    r"kv_cache: want .*, 128\] .*got .*, 64\]": change(kv_cache=lambda c: c[..., :64]),
    "kv_cache: want each .* contiguous": change(
        kv_cache=lambda c: c.transpose(2, 3).contiguous().transpose(2, 3)
    ),
    "kv_cache: want blocks of a multiple of 32 .* got 24": change(
        kv_cache=lambda c: c[:, :, :24].contiguous()
    ),
    "heads: want q heads divisible by kv heads, got 3 and 2": change(
        q=lambda q: q[:, :3].contiguous()
    ),
    "kv_layout: want one of .* got 'neon'": change(kv_layout="neon"),
    "seq_lens: want .*int32 .*int64": change(seq_lens=lambda t: t.long()),
    r"prompt_lens: want \[1\] torch.int32 .*got \[2\]": change(
        prompt_lens=torch.zeros(2, dtype=torch.int32)
    ),
    r"query_start_loc: want \[2\] .*got \[1\]": change(query_start_loc=lambda t: t[:1]),
    "query_start_loc: want it to ascend within the 130 rows": change(
        query_start_loc=lambda t: t + 5
    ),
    r"query_start_loc: .* got \[130, 0\]": change(query_start_loc=lambda t: t.flip(0)),
    r"seq_lens\[0\]: want at least its 130 rows, got 129": change(seq_lens=lambda t: t * 0 + 129),
    "block_table: want 5 columns .* got 3": change(
        block_table=lambda t: t[:, :3], seq_lens=lambda t: t * 0 + 600
    ),
    r"block_table\[0\]: want pages in \[0, 6\), got .* to 6": change(
        block_table=lambda t: t.clamp(max=2) * 3
    ),
    r"block_table\[0\]: want pages in .*, got -1 to": change(block_table=lambda t: t * 0 - 1),
    "block_table: want contiguous rows": change(block_table=lambda t: t.repeat(1, 2)[:, ::2]),
    r"requests: want distinct numbers below 1, got \[1\]": change(requests=[1]),
    r"requests: .* got \[0, 0\]": change(requests=[0, 0]),
    "scale: want a finite number above 0 in float32, got nan": change(scale=float("nan")),
    "scale: want a finite number above 0 in float32, got 1e-50": change(scale=1e-50),
    r"scale: want a finite number above 0 in float32, got 1e\+39": change(scale=1e39),
    "scale: .* got 0": change(scale=0.0),
    "scale: .* got -0.1": change(scale=-0.1),
    "policies: want one for each of 4 q heads, got 3": change(policies=[DENSE] * 3),
    r"policies\[1\]: ": change(policies=[{"selector": "dense"}, {"selector": "magic"}] * 2),
    "policies: .*tau": change(policies={"selector": "sale", "tau": float("nan")}),
    r"out: want \[130, 4, 64\]": change(out=torch.empty(1, 4, 64, dtype=torch.bfloat16)),
    "out: want adjacent channels": change(
        out=torch.empty(130, 64, 4, dtype=torch.bfloat16).transpose(1, 2)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    paged = make_paged([make_qkv(46, 130, 300)])
    names = ("q", "kv_cache", "block_table", "query_start_loc", "seq_lens")
    good: dict[str, Any] = dict(zip(names, paged.tensors, strict=True))
    for impl in ("reference", "cpu"):
        arguments = WRONG[message]({**good, "impl": impl})
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            paged_sparse_attention(**arguments)


@needs_core
def test_what_only_the_core_cannot_do_is_refused_by_it_alone() -> None:
    odd = make_qkv(47, 70, 70, dim=48)
    sparse_attention(*odd, impl="reference")
    with pytest.raises(ValueError, match=r"q: want head_dim in .*for impl 'cpu', got 48"):
        sparse_attention(*odd, impl="cpu")
    half = make_qkv(48, 70, 70, dtype=torch.float16)
    paged = make_paged([half], "amx")
    assert_accurate(run(paged, DENSE, "reference")[0], half, causal_mask(70, 70))
    for op in (paged_sparse_attention, select_tiles):
        with pytest.raises(ValueError, match=r"kv_layout: want .* with torch.float16 .*got 'amx'"):
            op(*paged.tensors, kv_layout="amx", impl="cpu")
