"""Zeros, constants, the largest and the smallest numbers, and NaN: what comes out, and where.

What is not finite stays with the rows that see it, as in the reference, whatever the instruction
set. Where the core differs from the reference is said in the last tests of this file.
"""

from __future__ import annotations

import pytest
import torch
from _attention import (
    DTYPES,
    QKV,
    ROUNDOFF,
    assert_accurate,
    causal_mask,
    element_mask,
    make_paged,
    make_qkv,
    needs_core,
    plain,
    run,
)
from _tiles import assert_same_tiles

from vllm_sparse_backend.ops import TileList, reference, select_tiles
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static
from vllm_sparse_backend.selection.estimate import scored_rows

pytestmark = [needs_core, pytest.mark.usefixtures("isa")]

# One of each for the four q heads of a kv head.
POLICIES: list[AnyPolicy] = [
    DENSE,
    Static(sink=16, local=16),
    Sale(sink=16, local=16, tau=0.02, tail=0),
    Mass(sink=16, local=16, tau=0.05, tail=0),
]
DIM, LENGTH = 64, 260
SCALE = DIM**-0.5


def attend(qkv: QKV, scale: float = SCALE) -> tuple[torch.Tensor, TileList]:
    """The core's output for one request under POLICIES, and the tiles it computed."""
    paged = make_paged([qkv])
    policies = POLICIES * (qkv[0].shape[1] // 4)
    tiles = select_tiles(*paged.tensors, policies, scale=scale, impl="cpu")
    return run(paged, policies, "cpu", scale=scale)[0], tiles


def uniform(low: float, high: float, seed: int = 0, heads: int = 4) -> QKV:
    """q and k within [low, high], ordinary values; one kv head."""
    g = torch.Generator().manual_seed(seed)
    q, k = (
        low + (high - low) * torch.rand(LENGTH, h, DIM, generator=g, dtype=torch.float64)
        for h in (heads, 1)
    )
    return q, k, torch.randn(LENGTH, 1, DIM, generator=g)


def cast(qkv: QKV, dtype: torch.dtype) -> QKV:
    q, k, v = qkv
    return q.to(dtype), k.to(dtype), v.to(dtype)


def assert_rows(
    out: torch.Tensor, qkv: QKV, tiles: TileList, head: int, rows: torch.Tensor
) -> None:
    """Some rows (bool [T]) of one head are attention over the kept tiles, to the budget."""
    q, k, v = qkv
    kv = slice(head // 4, head // 4 + 1)
    own = out[rows, head : head + 1], q[rows, head : head + 1]
    mask = element_mask(tiles)[head : head + 1, rows]
    assert_accurate(own[0], (own[1], k[:, kv], v[:, kv]), mask)


# Zeros and constants


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", ["q", "k", "both"])
def test_zeros_see_all_kept_keys_alike(dtype: torch.dtype, zero: str) -> None:
    q, k, v = make_qkv(1, LENGTH, LENGTH, 4, 1, DIM, dtype)
    for x in (q,) * (zero != "k") + (k,) * (zero != "q"):
        x.zero_()
    out, tiles = attend((q, k, v))
    kept = element_mask(tiles).double()  # [H, T, S]
    mean = torch.einsum("hts,sd->thd", kept / kept.sum(2, keepdim=True), v[:, 0].double())
    assert_accurate(out, (q, k, v), element_mask(tiles))
    assert torch.allclose(out.double(), mean, rtol=2 * ROUNDOFF[dtype], atol=1e-6)
    # exp(s - m) / l is 1 / l, with 33 keys and more in l: above what both thresholds ask for.
    counts = zip(tiles.computed, tiles.causal, strict=True)
    assert [a == b for a, b in counts] == [True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-3, 65504.0])
def test_constant_values_come_out_as_they_went_in(
    isa: str, dtype: torch.dtype, value: float
) -> None:
    q, k, v = make_qkv(2, LENGTH, LENGTH, 4, 1, DIM, dtype)
    v.fill_(value)
    out, _ = attend((q, k, v))
    error = ((out.double() - v[0, 0, 0].double()) / v[0, 0, 0].double()).abs().max()
    if dtype == torch.float32:
        assert error <= LENGTH * ROUNDOFF[dtype]  # of a sum of so many terms
    elif isa == "avx512_bf16" and dtype == torch.bfloat16:  # weights rounded, their sum is not
        assert error <= 2 * ROUNDOFF[dtype]
    else:
        assert error == 0


# Large numbers


def sharp(qkv: QKV, tiles: TileList) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H] each: the one key with all of a row's weight; whether it is one beyond rounding.

    An fp32 score lies within D * u * |q| |k| of exact, so much may two keys change places.
    """
    q, k = qkv[0].double(), qkv[1].double()
    scores = SCALE * torch.einsum("thd,sd->hts", q, k[:, 0])
    best, key = scores.masked_fill(~element_mask(tiles), -torch.inf).topk(2, 2)
    reach = q.norm(dim=2).T * k.norm(dim=2).max()
    clear = best[..., 0] - best[..., 1] > 2 * SCALE * (DIM + 4) * 2.0**-24 * reach + 30
    return key[..., 0].T, clear.T


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 65504.0),
        (torch.bfloat16, 1e5),
        (torch.bfloat16, 1e9),
        (torch.bfloat16, 3e18),
        (torch.float32, 1e4),
        (torch.float32, 1e5),
        (torch.float32, 1e12),
        (torch.float32, 3e18),
    ],
)
def test_huge_finite_scores(dtype: torch.dtype, size: float, sign: float) -> None:
    """All of one sign, to 1e37: each row is its best key's value, as exactly as that is known."""
    qkv = cast(uniform(0.2 * size, size), dtype)
    qkv[0].mul_(sign)
    out, tiles = attend(qkv)
    assert reference.attend(*qkv, tiles, SCALE).isfinite().all()
    assert out.isfinite().all()
    key, clear = sharp(qkv, tiles)
    assert clear.double().mean() > 0.9
    assert torch.equal(out[clear], qkv[2][key, 0][clear])


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_choose_the_tiles_of_the_reference(dtype: torch.dtype) -> None:
    for size in (1e2, 1e3, 1e4, 6e4) + (1e9, 1e15) * (dtype != torch.float16):
        q, k, v = make_qkv(3, LENGTH, LENGTH, 4, 1, DIM, torch.float32)
        q, k = (size * torch.nn.functional.normalize(x, dim=2) for x in (q, k))
        qkv = cast((q, k, v), dtype)
        _, tiles = attend(qkv)
        other = reference.select(qkv[0], qkv[1], POLICIES, SCALE)
        assert_same_tiles(tiles, other, qkv, POLICIES, SCALE)
        assert sum(tiles.computed) < sum(tiles.causal)


@pytest.mark.parametrize("above", [60, 150, 300, 3000])
def test_keys_to_come_do_not_hide_those_that_are_there(above: int) -> None:
    """The mean that is taken off the keys is of the whole context, and may lie anywhere.

    Queries of the first half look at two tiles; those behind them have scores higher by far.
    """
    q, k, v = torch.randn(3, 512, 1, DIM, generator=torch.Generator().manual_seed(4))
    q.zero_()[..., 0] = 8
    k *= 0.1
    k[64:96, 0, 0] += 30
    k[256:, 0, 0] += above
    paged = make_paged([(q, k, v)])
    for policy in (Sale(sink=16, local=16), Mass(sink=16, local=16)):
        tiles = select_tiles(*paged.tensors, policy, impl="cpu")
        for block in (2, 3):  # no window reaches as far as the two tiles
            assert {4, 5} <= set(tiles.row(0, block).tolist())
        other = select_tiles(*paged.tensors, policy, impl="reference")
        assert_same_tiles(tiles, other, (q, k, v), [policy], SCALE)


@pytest.mark.parametrize("key", [5, 100, 255])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_that_overflows(dtype: torch.dtype, sign: float, key: int) -> None:
    """+inf makes its row NaN, as inf - inf is; a key at -inf has no weight. As in the reference."""
    q, k, v = uniform(0.5, 1)
    # q * k is 1e20 at most, the one key's 1e39; fp16 gets there by the scale alone.
    size, scale = (1e4, 1e30) if dtype == torch.float16 else (1e10, SCALE)
    q *= size
    k *= 1e-7 if dtype == torch.float16 else size
    k[key] = sign * (6e4 if dtype == torch.float16 else 1e30)
    if sign < 0:
        k[0] = 0  # without it the rows from `key` on might see nothing else, where it is key 0
    qkv = cast((q, k, v), dtype)
    out, tiles = attend(qkv, scale)
    other = reference.attend(*qkv, tiles, scale)
    scores = scale * torch.einsum("thd,sd->hts", qkv[0].float(), qkv[1][:, 0].float())
    scores = scores.masked_fill(~element_mask(tiles), -torch.inf)
    bad = (scores == torch.inf).any(2).T  # [T, H]
    assert bool(bad.any()) == (sign > 0)
    for result in (out, other):
        assert torch.equal(result.isnan().all(2), bad)
        assert result[~bad].isfinite().all()
    if sign < 0:
        assert (out.double() - other.double()).abs().max() <= 8 * ROUNDOFF[dtype]


# Small numbers


@pytest.mark.parametrize(("dtype", "tiny"), list(zip(DTYPES, (1e-40, 6e-8, 1e-40), strict=True)))
@pytest.mark.parametrize("where", ["q", "k", "qk", "v"])
def test_subnormal_numbers(isa: str, dtype: torch.dtype, tiny: float, where: str) -> None:
    """Computed with like others, but that bf16 products and conversions take them for zeros."""
    q, k, v = make_qkv(5, LENGTH, LENGTH, 4, 1, DIM, torch.float32)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if name in where:
            x.copy_(tiny * (x * 10).round())
    qkv = cast((q, k, v), dtype)
    assert all(x.any() for x in qkv), "the numbers are gone before they are tried"
    out, tiles = attend(qkv)
    other = reference.select(qkv[0], qkv[1], POLICIES, SCALE)
    assert_same_tiles(tiles, other, qkv, POLICIES, SCALE)
    if where == "v":  # there are whole units only: what each term of a sum is rounded to
        wide = (qkv[0].double(), qkv[1].double(), qkv[2].double())
        truth = plain(*wide, element_mask(tiles))
        unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        if isa == "avx512_bf16" and dtype == torch.bfloat16:
            unit = torch.finfo(dtype).smallest_normal
        terms = LENGTH if dtype == torch.float32 else 1
        assert (out.double() - truth).abs().max() <= terms * unit
    else:
        assert_accurate(out, qkv, element_mask(tiles))


# NaN: only the rows that see it


def clean_and_poisoned(
    where: str, row: int, number: torch.Tensor, head: int = 0
) -> tuple[list[torch.Tensor], list[TileList], QKV]:
    """Outputs and tiles of [clean, poisoned], eight q heads, the number in one head.

    The batch has a second request, which the first one's number does not change.
    """
    outs, tiles = [], []
    qkv = make_qkv(6, LENGTH, LENGTH, 8, 2, DIM, number.dtype)
    other = make_qkv(7, 100, 300, 8, 2, DIM, number.dtype)
    for poisoned in (False, True):
        q, k, v = (x.clone() for x in qkv)
        if poisoned:
            {"q": q, "k": k, "v": v}[where][row, head, 5] = number
        paged = make_paged([other, (q, k, v)])
        outs.append(run(paged, POLICIES * 2, "cpu")[0])
        tiles.append(select_tiles(*paged.tensors, POLICIES * 2, request=1, impl="cpu"))
    assert outs[0].isfinite().all()
    assert torch.equal(outs[0][:100], outs[1][:100])
    return [out[100:] for out in outs], tiles, qkv


def nan_of(dtype: torch.dtype, bits: int = 0x7FC00000) -> torch.Tensor:
    """The NaN with these bits as an fp32 number, or their upper half in 16 bits."""
    if dtype == torch.float32:
        return torch.tensor([bits - (bits >> 31 << 32)], dtype=torch.int32).view(dtype)[0]
    return torch.tensor(torch.nan, dtype=dtype)


NANS = [(d, 0x7FC00000) for d in DTYPES] + [
    (torch.float32, bits) for bits in (0x7FC00001, 0x7FFFFFFF, 0xFFC00001, 0x7F800001)
]
# In the sink, inside a q block, behind it; the last there is. All of them for the usual NaN.
ROWS = [
    (*nan, row) for nan in NANS for row in (0, 77, 130, LENGTH - 1)[: 4 if nan in NANS[:3] else 1]
]


@pytest.mark.parametrize(("dtype", "bits", "row"), ROWS)
def test_a_nan_in_a_key(dtype: torch.dtype, bits: int, row: int) -> None:
    """NaN in all channels of the rows that compute that key; others as without it.

    Where tiles are chosen by scores all are kept, since the keys' mean is NaN: those heads' other
    rows are dense attention.
    """
    (clean, out), (before, tiles), qkv = clean_and_poisoned("k", row, nan_of(dtype, bits))
    seen = element_mask(tiles)[:, :, row].T  # [T, H]
    seen[:, 4:] = False  # the other kv head
    assert seen[:, 0].tolist() == [position >= row for position in range(LENGTH)]
    assert torch.equal(out.isnan().any(2), seen)
    assert torch.equal(out.isnan().all(2), seen)
    assert torch.equal(out[:, 4:], clean[:, 4:])
    for head in (0, 1):
        assert torch.equal(tiles.mask(head), before.mask(head))
        assert torch.equal(out[~seen[:, head], head], clean[~seen[:, head], head])
    for head in (2, 3):
        assert tiles.mask(head).sum() == before.mask(0).sum() > before.mask(head).sum()
        if row:
            assert_rows(out, qkv, tiles, head, ~seen[:, head])


# A q block's first, last and two other rows; all kinds of heads.
LOOKING = [(0, 2), (77, 3), (77, 2), (127, 3), (LENGTH - 1, 2), (77, 0), (130, 1)]


@pytest.mark.parametrize(
    ("dtype", "bits", "row", "head"),
    [(*nan, *at) for nan in NANS[:3] for at in LOOKING] + [(*nan, 77, 3) for nan in NANS[3:]],
)
def test_a_nan_in_a_query(dtype: torch.dtype, bits: int, row: int, head: int) -> None:
    """NaN in all channels of that row of that head.

    Where the row is scored its q block keeps all tiles; whatever is not of that head and q block
    stays as it was, to the bit in another kv head or q block, to rounding in the same.
    """
    (clean, out), (before, tiles), qkv = clean_and_poisoned("q", row, nan_of(dtype, bits), head)
    bad = torch.zeros(LENGTH, 8, dtype=torch.bool)
    bad[row, head] = True
    assert torch.equal(out.isnan().any(2), bad)
    assert torch.equal(out.isnan().all(2), bad)
    block = row // 64
    end = min(block * 64 + 64, LENGTH)
    policy = POLICIES[head]
    scored = (
        isinstance(policy, Sale | Mass)
        and row in scored_rows(policy, block * 64, end, LENGTH).tolist()
    )
    for other in range(8):
        want = before.mask(other)
        if scored and other == head:
            want[block] = before.mask(0)[block]
        assert torch.equal(tiles.mask(other), want)
    elsewhere = torch.arange(LENGTH) // 64 != block
    assert torch.equal(out[elsewhere], clean[elsewhere])
    assert torch.equal(out[:, 4:], clean[:, 4:])
    for other in range(4):
        assert_rows(out, qkv, tiles, other, ~bad[:, other])


@pytest.mark.parametrize(("dtype", "bits", "row"), ROWS)
def test_a_nan_in_a_value(dtype: torch.dtype, bits: int, row: int) -> None:
    """NaN in that channel for the q blocks that compute that key's tile; nothing else changes.

    Of the q block that the key itself is in that means rows before it, too: their weight of it is
    0, and 0 times NaN is NaN. (The reference: of every row, kept or not.)
    """
    (clean, out), (before, tiles), _ = clean_and_poisoned("v", row, nan_of(dtype, bits))
    bad = torch.zeros(LENGTH, 8, DIM, dtype=torch.bool)
    for head in range(8):
        assert torch.equal(tiles.mask(head), before.mask(head))
        if head < 4:
            computed = tiles.mask(head)[:, row // 16]  # [q blocks]
            bad[:, head, 5] = computed.repeat_interleave(64)[:LENGTH]
    assert not bad[: row // 64 * 64].any()
    assert bad[row:, :, 5].any()
    assert torch.equal(out.isnan(), bad)
    assert torch.equal(out[~bad], clean[~bad])


# Where the core is not the reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_of_which_all_scores_are_minus_infinity_is_zero(dtype: torch.dtype) -> None:
    """In the reference it is NaN."""
    q, k, v = cast(uniform(1e25, 2e25), dtype)
    out, tiles = attend((-q, k, v))
    assert reference.attend(-q, k, v, tiles, SCALE).isnan().all()
    assert not out.any()


def test_scores_overflow_by_log2_e_sooner() -> None:
    """The core's are in base 2: from 2.36e38 on, where the largest float is 3.40e38."""
    v = torch.randn(64, 1, DIM, generator=torch.Generator().manual_seed(8))
    for score, same in ((2.3e38, True), (2.4e38, False)):
        q, k = torch.zeros(64, 4, DIM), torch.zeros(64, 1, DIM)
        q[..., 0], k[..., 0] = 1e19, score / 1e19
        out, tiles = attend((q, k, v), 1.0)
        assert reference.attend(q, k, v, tiles, 1.0).isfinite().all()
        assert bool(out.isnan().all()) is not same
        if same:
            assert_accurate(out, (q * 0, k, v), causal_mask(64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_summed_before_they_are_divided(dtype: torch.dtype) -> None:
    """So that equal weights of n keys overflow from 3.4e38 / n on."""
    q, k, v = make_qkv(9, LENGTH, LENGTH, 4, 1, DIM, dtype)
    q.zero_()
    out, tiles = attend((q, k, v.fill_(1e36)))
    assert_accurate(out, (q, k, v), element_mask(tiles))
    out, tiles = attend((q, k, v.fill_(1e38)))
    assert reference.attend(q, k, v, tiles, SCALE).isfinite().all()
    assert not out[-1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_that_cannot_be_scored_keep_everything(dtype: torch.dtype) -> None:
    """From 1e34 on the size of a query code's unit, as the kernels hold it, is infinite."""
    q, k, v = make_qkv(10, LENGTH, LENGTH, 4, 1, DIM, torch.float32)
    qkv = cast((q * 1e37, k * 1e-36, v), dtype)
    out, tiles = attend(qkv)
    other = reference.select(qkv[0], qkv[1], POLICIES, SCALE)
    for head in (2, 3):
        assert tiles.computed[head] == tiles.causal[head] > other.computed[head]
    assert_accurate(out, qkv, element_mask(tiles))
