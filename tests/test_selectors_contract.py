"""List selectors: what they are given, what they owe, and what is said of those that do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from _attention import (
    DTYPES,
    IMPLS,
    assert_accurate,
    causal_mask,
    element_mask,
    make_paged,
    make_qkv,
    needs_core,
    run,
)
from _selectors import Everything, Nothing, Peak
from _tiles import assert_same_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.ops import PolicyTable, select_tiles, sparse_attention
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.ops.listed import rehearse
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.selection import (
    DENSE,
    AnyPolicy,
    ListSelector,
    Mass,
    Sale,
    Static,
    keeps_all,
    scaled,
)
from vllm_sparse_backend.selection.kept import kept_tiles
from vllm_sparse_backend.selection.s2 import Strided
from vllm_sparse_backend.selection.static import always_kept
from vllm_sparse_backend.selection.view import View

SHAPES = [(1, 1), (64, 64), (65, 400), (1, 400), (100, 463), (700, 700), (500, 1203)]
MIXED: list[AnyPolicy] = [
    Strided(stride=3, sink=16, local=64),
    Sale(tau=0.02, sink=16, local=64),
    Peak(tau=0.6, sink=16, local=64, tile=32),
    Mass(tau=0.02, sink=16, local=64, tile=64),
]


class Saved(ListSelector):
    """Keeps nothing, and the views it was given."""

    selector: Literal["saved"] = "saved"
    reads: bool = True

    def keep(self, view: View) -> torch.Tensor:
        views.append(view)
        if self.reads:
            assert view.k.shape == view.v.shape == (view.seq_len, view.q.shape[2])
        return torch.zeros_like(view.causal).expand(len(view.heads), -1, -1)


views: list[View] = []


@pytest.fixture(autouse=True)
def _no_views() -> None:
    views.clear()


def view_of(rows: int, seq_len: int, tile: int = 16, heads: int = 2) -> View:
    q, k, v = make_qkv(rows + seq_len, rows, seq_len, heads, 1)
    return View(
        q=q.transpose(0, 1),
        seq_len=seq_len,
        tile=tile,
        scale=0.125,
        prompt_len=seq_len,
        heads=tuple(range(heads)),
        num_heads=heads,
        layer=None,
        read=lambda: (k[:, 0], v[:, 0]),
    )


# What is always in


SIZES = st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))
WINDOWS = st.fixed_dictionaries(
    {
        "sink": st.integers(1, 300),
        "local": st.integers(0, 400),
        "growth": st.floats(0, 1),
        "tile": st.sampled_from([16, 32, 64]),
    }
)


@settings(deadline=None)
@given(SIZES, WINDOWS)
def test_sink_window_and_diagonal_are_in_whatever_a_selector_says(
    size: tuple[int, int], window: dict[str, Any]
) -> None:
    view = view_of(*size, tile=window["tile"])
    nothing, everything = Nothing(**window), Everything(**window)
    of_nothing, of_all = kept_tiles(nothing, view), kept_tiles(everything, view)
    for at, block in enumerate(view.blocks):
        wanted = always_kept(nothing, block.start, block.end)
        assert wanted[block.first // nothing.tile :].all(), "the diagonal"
        assert torch.equal(of_nothing[:, at, : len(wanted)], wanted.expand(2, -1))
        assert of_all[:, at, : len(wanted)].all()
        assert not of_nothing[:, at, len(wanted) :].any()
        assert not of_all[:, at, len(wanted) :].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_a_selector_that_keeps_nothing_is_a_window(impl: str, tile: Any) -> None:
    batch = [make_qkv(r, *shape) for r, shape in enumerate(SHAPES)]
    paged = make_paged(batch)
    window = {"sink": 20, "local": 70, "growth": 0.1, "tile": tile}
    out, stats = run(paged, Nothing(**window), impl)
    other, counted = run(paged, Static(**window), impl)
    assert torch.equal(out, other)
    assert stats.tiles_computed == counted.tiles_computed
    assert stats.tiles_causal == counted.tiles_causal
    out, stats = run(paged, Everything(tile=tile), impl)
    assert stats.tiles_computed == stats.tiles_causal
    for r, qkv in enumerate(batch):
        rows = slice(*paged.query_start_loc[r : r + 2].tolist())
        assert_accurate(out[rows], qkv, causal_mask(*SHAPES[r]))


# Beside fused selectors, on every path


@needs_core
@pytest.mark.parametrize("kv_layout", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_and_listed_heads_side_by_side(dtype: torch.dtype, kv_layout: str) -> None:
    if kv_layout == "amx" and dtype != torch.bfloat16:
        pytest.skip("a layout of bfloat16 alone")
    batch = [make_qkv(r, *shape, dtype=dtype) for r, shape in enumerate(SHAPES)]
    paged = make_paged(batch, kv_layout, 64)
    out, stats = run(paged, MIXED, "cpu")
    computed = torch.zeros(4, dtype=torch.int64)
    for r, qkv in enumerate(batch):
        own, other = (
            select_tiles(*paged.tensors, MIXED, request=r, kv_layout=kv_layout, impl=impl)
            for impl in ("cpu", "reference")
        )
        assert_same_tiles(own, other, qkv, MIXED, 0.125)
        rows = slice(*paged.query_start_loc[r : r + 2].tolist())
        assert_accurate(out[rows], qkv, element_mask(own))
        computed += torch.tensor(own.computed)
    assert stats.tiles_computed == computed.tolist()
    assert max(stats.density) < 0.95


@pytest.mark.parametrize("impl", IMPLS)
def test_neighbours_in_a_batch_change_nothing(impl: str) -> None:
    batch = [make_qkv(r, *shape) for r, shape in enumerate(SHAPES)]
    paged = make_paged(batch)
    together, stats = run(paged, MIXED, impl)
    alone = [run(make_paged([qkv]), MIXED, impl) for qkv in batch]
    for r, (out, _) in enumerate(alone):
        rows = slice(*paged.query_start_loc[r : r + 2].tolist())
        assert torch.equal(together[rows], out)
    counts = [sum(counts) for counts in zip(*(s.tiles_computed for _, s in alone), strict=True)]
    assert stats.tiles_computed == counts
    some, _ = run(paged, MIXED, impl, requests=[4, 6])
    starts = paged.query_start_loc.tolist()
    for r in (4, 6):
        rows = slice(starts[r], starts[r + 1])
        assert torch.equal(together[rows], some[rows])
    assert some[: starts[4]].isnan().all()


@needs_core
@pytest.mark.parametrize("chunk", [50, 64, 100, 256])
def test_tiles_that_no_query_decides_do_not_move_with_the_chunks(chunk: int) -> None:
    q, k, v = make_qkv(2, 700, 700)
    policy = Strided(stride=4, sink=20, local=50, tile=32)
    whole, _ = sparse_attention(q, k, v, policy)
    for begin in range(0, 700, chunk):
        end = min(begin + chunk, 700)
        part, _ = sparse_attention(q[begin:end], k[:end], v[:end], policy)
        assert torch.equal(part, whole[begin:end])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_policy_that_is_not_followed_yet_is_not_asked(impl: str) -> None:
    batch = [make_qkv(r, *shape) for r, shape in enumerate([(300, 300), (200, 600)])]
    paged = make_paged(batch)
    saved = Saved(sink=16, local=16)
    table = PolicyTable([saved, saved, DENSE, saved], [400, 700, 0, 400])
    out, stats = run(paged, table, impl)
    assert [(view.seq_len, view.heads) for view in views] == [(600, (0,)), (600, (3,))]
    assert_accurate(out[:300], batch[0], causal_mask(300, 300))
    assert stats.density[1:3] == [1.0, 1.0]
    assert stats.density[0] == stats.density[3] < 1


@pytest.mark.parametrize("impl", IMPLS)
def test_the_time_it_takes_is_selections(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = make_paged([make_qkv(0, 100, 200)])
    keep = Nothing.keep

    def slow(self: Nothing, view: View) -> torch.Tensor:
        time.sleep(0.1)
        return keep(self, view)

    monkeypatch.setattr(Nothing, "keep", slow)
    _, stats = run(paged, Nothing(), impl)
    assert stats.select_seconds >= 0.2  # two kv heads
    assert stats.attend_seconds < 0.2


def test_an_empty_query_asks_nobody() -> None:
    q, k, v = make_qkv(3, 0, 100)
    for impl in ("reference", "cpu"):
        out, stats = sparse_attention(q, k, v, Saved(), impl=impl)
        assert out.shape == (0, 4, 64)
        assert stats.tiles_causal == [0] * 4
    assert not views


# What it is given


@needs_core
@pytest.mark.parametrize("kv_layout", ["vec", "amx"])
def test_a_view_has_the_requests_own_tensors(kv_layout: str) -> None:
    batch = [make_qkv(r, *shape) for r, shape in enumerate([(70, 90), (130, 300)])]
    paged = make_paged(batch, kv_layout, 32)
    one, other = Saved(), Saved(local=64)
    table = PolicyTable([one, other, one, one], place=Place(7, 4, 12))
    prompts = torch.tensor([90, 1000], dtype=torch.int32)
    select_tiles(
        *paged.tensors, table, request=1, scale=0.5, prompt_lens=prompts, kv_layout=kv_layout
    )
    q, k, v = batch[1]
    assert [view.heads for view in views] == [(4,), (5,), (6, 7)]
    for view, local in zip(views, ([0], [1], [2, 3]), strict=True):
        assert (view.layer, view.num_heads, view.prompt_len) == (7, 12, 1000)
        assert (view.seq_len, view.offset, view.scale, view.tile) == (300, 170, 0.5, 16)
        assert torch.equal(view.q, q.transpose(0, 1)[local])
        assert torch.equal(view.k, k[:, local[0] // 2])
        assert torch.equal(view.v, v[:, local[0] // 2])


def test_keys_and_values_are_read_when_asked_for_and_once() -> None:
    counted = []

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        counted.append(1)
        return torch.zeros(100, 8), torch.zeros(100, 8)

    view = View(torch.zeros(1, 10, 8), 100, 16, 1.0, 100, (0,), 1, None, read)
    assert not kept_tiles(Nothing(sink=1, local=0), view).all()
    assert not counted
    assert view.k.shape == view.v.shape
    assert len(counted) == 1


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([16, 32, 64]), st.integers(1, 200))
def test_the_helpers_say_what_their_names_say(size: tuple[int, int], tile: int, n: int) -> None:
    rows, seq_len = size
    view = view_of(rows, seq_len, tile)
    offset = seq_len - rows
    assert view.offset == offset
    assert view.first_block == view.blocks[0].start // 64
    covered = [p for block in view.blocks for p in range(block.first, block.end)]
    assert covered == list(range(offset, seq_len))
    pooled = view.pooled_q()
    for at, block in enumerate(view.blocks):
        own = view.q[:, view.rows(block)]
        assert own.shape[1] == block.end - block.first
        torch.testing.assert_close(pooled[:, at], own.float().mean(1))
        seen = [any(tile * j <= p for p in range(block.first, block.end))
                for j in range(view.num_tiles)]  # fmt: skip
        assert view.causal[at].tolist() == seen
    keys = view.k.float()
    for width in (tile, n):
        means = torch.stack([keys[at : at + width].mean(0) for at in range(0, seq_len, width)])
        torch.testing.assert_close(view.pooled_k(width), means)
    torch.testing.assert_close(view.pooled_k(), view.pooled_k(tile))
    last = view.last(n)
    assert torch.equal(view.q[:, last], view.q[:, -n:])
    scores = view.scores(last)
    for row, position in enumerate(range(seq_len)[last.start - rows :]):
        exact = 0.125 * (keys @ view.q[:, position - offset].float().T).T
        torch.testing.assert_close(scores[:, row, : position + 1], exact[:, : position + 1])
        assert (scores[:, row, position + 1 :] == -torch.inf).all()
    by_tile = view.by_tile(torch.arange(1.0, seq_len + 1))
    assert by_tile.shape == (view.num_tiles, tile)
    assert by_tile.flatten()[:seq_len].tolist() == list(range(1, seq_len + 1))
    assert (by_tile.flatten()[seq_len:] == 0).all()


# What does not do what it owes


class Broken(ListSelector):
    """Returns what a test says."""

    selector: Literal["broken"] = "broken"
    how: str = "shape"

    def keep(self, view: View) -> torch.Tensor:
        good = torch.zeros(len(view.heads), len(view.blocks), view.num_tiles, dtype=torch.bool)
        wrong: dict[str, Callable[[], Any]] = {
            "shape": lambda: good[:, :, :-1],
            "one head": lambda: good[0],
            "float": good.float,
            "device": lambda: good.to("meta"),
            "list": good.tolist,
            "none": lambda: None,
            "raises": lambda: good[7],
        }
        return wrong[self.how]()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shape", r"want \[2, 4, 19\] torch.bool on cpu, got \[2, 4, 18\] torch.bool on cpu"),
        ("one head", r"want \[2, 4, 19\] torch.bool on cpu, got \[4, 19\]"),
        ("float", r"want \[2, 4, 19\] torch.bool on cpu, got \[2, 4, 19\] torch.float32"),
        ("device", "want .* on cpu, got .* on meta"),
        ("list", "want a tensor, got list"),
        ("none", "want a tensor, got NoneType"),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_garbage_is_an_error_that_names_the_selector(impl: str, how: str, said: str) -> None:
    q, k, v = make_qkv(0, 230, 300)
    name = r"selector 'broken' \(test_selectors_contract.Broken\): keep: "
    with pytest.raises(SelectorError, match=name + said):
        sparse_attention(q, k, v, Broken(how=how), impl=impl)
    with pytest.raises(SelectorError, match="selector 'broken'"):
        rehearse(PolicyTable([DENSE, Broken(how=how)]), 64)


def test_what_a_selector_raises_comes_with_its_name() -> None:
    q, k, v = make_qkv(0, 130, 200)
    with pytest.raises(IndexError) as caught:
        sparse_attention(q, k, v, Broken(how="raises"), impl="cpu")
    (note,) = caught.value.__notes__
    assert "selector 'broken'" in note
    assert "heads (0, 1) of layer None" in note


def test_a_rehearsal_asks_every_selector_once() -> None:
    one, other = Saved(), Saved(local=64)
    rehearse(PolicyTable([one, Sale(), other, one], place=Place(3, 8, 16)), 80)
    assert [(view.layer, view.heads, view.num_heads) for view in views] == [
        (3, (8,), 16),
        (3, (10,), 16),
    ]
    rehearse(PolicyTable(MIXED), 128)


# Around them


def test_a_threshold_scale() -> None:
    assert scaled(Sale(tau=0.01), 3.0) == Sale(tau=0.03)
    assert scaled(Mass(tau=0.5), 3.0) == Mass(tau=1.0)
    for policy in (DENSE, Static(), Sale(tau=0), Strided(), Nothing()):
        assert scaled(policy, 2.0) is None


def test_a_list_selector_is_followed_from_where_it_can_leave_something_out() -> None:
    policy = Strided(sink=64, local=256)
    assert not keeps_all(policy)
    for isa in cost.RATES:
        assert cost.sparse_wins_from(isa, policy, 64) == 64 + 256 + 64
        assert cost.sparse_wins_from(isa, Strided(growth=1.0), 64) is None
        assert cost.selection_seconds(isa, policy, 2048, 8192, 4, 64) == 0.0
