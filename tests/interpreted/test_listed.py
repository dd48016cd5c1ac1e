"""List selectors before the kernels in Triton, interpreted: the tiles of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import DTYPES, QKV, Paged, assert_accurate, element_mask, make_paged, make_qkv, run
from _selectors import Everything, Nothing, Peak
from _tiles import assert_same_tiles

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.fit_gates.fit import untaught
from vllm_sparse_backend.ops import PolicyTable, TileList, select_tiles
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.ops.triton import warm_up
from vllm_sparse_backend.ops.triton.listed import as_bits
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static, gates
from vllm_sparse_backend.selection.gates import Rotation
from vllm_sparse_backend.selection.s2 import Strided
from vllm_sparse_backend.selection.seer import Seer
from vllm_sparse_backend.selection.vertical_slash import VerticalSlash

WINDOW: dict[str, Any] = {"sink": 16, "local": 16}
LISTED: list[AnyPolicy] = [
    Strided(stride=3, **WINDOW),
    Peak(tau=0.6, tile=32, growth=0.1, **WINDOW),
    VerticalSlash(columns=30, diagonals=100, sink=20, local=33, tile=64),
    Peak(tau=0.9, **WINDOW),
]
MIXED: list[AnyPolicy] = [
    Sale(tau=0.05, tail=16, **WINDOW),
    Peak(tau=0.6, tile=64, **WINDOW),
    DENSE,
    Strided(stride=4, **WINDOW),
    Mass(tau=0.05, tail=16, tile=32, **WINDOW),
    Static(**WINDOW),
]


def tiles_of(paged: Paged, policies: Any, impl: str, request: int = 0, **more: Any) -> TileList:
    return select_tiles(
        *paged.tensors, policies, request=request, kv_layout="strided", impl=impl, **more
    )


def assert_follows(paged: Paged, batch: list[QKV], policies: list[AnyPolicy]) -> None:
    """The output and the counts are of the reference's tiles, request by request."""
    out, stats = run(paged, policies, "triton")
    computed = torch.zeros(len(policies), dtype=torch.int64)
    for r, qkv in enumerate(batch):
        own, other = (tiles_of(paged, policies, impl, r) for impl in ("triton", "reference"))
        assert_same_tiles(own, other, qkv, policies, qkv[0].shape[2] ** -0.5)
        rows = slice(*paged.query_start_loc[r : r + 2].tolist())
        assert_accurate(out[rows], qkv, element_mask(own))
        computed += torch.tensor(own.computed)
    assert stats.tiles_computed == computed.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiles_of_the_reference(dtype: torch.dtype) -> None:
    batch = [make_qkv(1, 130, 400, dtype=dtype)]
    paged = make_paged(batch, "strided", 32)
    assert_follows(paged, batch, LISTED)
    tiles = tiles_of(paged, LISTED, "triton")
    assert all(few < of for few, of in zip(tiles.computed, tiles.causal, strict=True))


def test_beside_fused_ones_in_groups_and_requests() -> None:
    shapes = [(70, 300), (1, 90), (64, 64), (5, 640)]  # of one word of subtiles, and of two
    batch = [make_qkv(r, *shape, 6, 2) for r, shape in enumerate(shapes)]
    assert_follows(make_paged(batch, "strided", 16), batch, MIXED)


def test_selectors_alone_with_a_kv_head_each() -> None:
    batch = [make_qkv(3, 40, 200, 2, 2, 80)]
    assert_follows(make_paged(batch, "strided", 48), batch, LISTED[:2])


@pytest.mark.parametrize("tile", [16, 64])
def test_windows_are_kept_and_nothing_else(tile: Any) -> None:
    window: dict[str, Any] = {"sink": 20, "local": 70, "growth": 0.1, "tile": tile}
    paged = make_paged([make_qkv(4, 100, 463, 2, 1)], "strided", 64)
    own, other = (tiles_of(paged, it(**window), "triton") for it in (Nothing, Static))
    assert torch.equal(own.indptr, other.indptr) and torch.equal(own.tiles, other.tiles)
    whole = tiles_of(paged, Everything(tile=tile), "triton")
    assert whole.computed == whole.causal


def test_a_policy_that_is_not_followed_yet_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []
    keep = Nothing.keep

    def saved(self: Nothing, view: Any) -> torch.Tensor:
        asked.append((view.seq_len, view.heads))
        return keep(self, view)

    monkeypatch.setattr(Nothing, "keep", saved)
    paged = make_paged([make_qkv(r, 20, length) for r, length in enumerate((200, 300))], "strided")
    policy = Nothing(**WINDOW)
    table = PolicyTable([policy, policy, DENSE, policy], [250, 400, 0, 0])
    _, stats = run(paged, table, "triton")
    assert asked == [(200, (3,)), (300, (0,)), (300, (3,))]
    whole = [False, True, True, False]
    assert [density == 1 for density in stats.density] == whole
    short = tiles_of(paged, table, "triton")
    assert [x == y for x, y in zip(short.computed, short.causal, strict=True)] == [True] * 3 + [
        False
    ]


def test_places_and_prompts_are_told(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    its = untaught(8, 64, Rotation(10000.0 ** -(torch.arange(32) / 32)))
    gates.save(path, {3: its}, {})
    policies = [Seer(gates=str(path), threshold=0.15, tile=tile, **WINDOW) for tile in (16, 64)] * 2
    table = PolicyTable(policies, place=Place(3, 4, 8))
    qkv = make_qkv(5, 150, 500)
    paged = make_paged([qkv], "strided", 32)
    own, other = (tiles_of(paged, table, impl) for impl in ("triton", "reference"))
    assert torch.equal(own.indptr, other.indptr) and torch.equal(own.tiles, other.tiles)
    assert sum(own.computed) < 0.8 * sum(own.causal)
    # Of no layer there are no gates: so the place goes into the warm-up, too.
    warm_up(4, 2, 64, torch.bfloat16, 16, [(table, None)], torch.device("cpu"))
    with pytest.raises(SelectorError, match="want a layer of a model"):
        tiles_of(paged, policies, "triton")

    seen: list[int] = []

    class Prompt(Nothing):
        def keep(self, view: Any) -> torch.Tensor:
            seen.append(view.prompt_len)
            return super().keep(view)

    prompts = torch.tensor([900], dtype=torch.int32)
    tiles_of(paged, Prompt(), "triton", prompt_lens=prompts)
    assert seen == [900, 900]


def test_the_time_it_takes_is_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    keep = Nothing.keep

    def slow(self: Nothing, view: Any) -> torch.Tensor:
        time.sleep(1.0)
        return keep(self, view)

    monkeypatch.setattr(Nothing, "keep", slow)
    _, stats = run(make_paged([make_qkv(0, 4, 20)], "strided", 16), Nothing(), "triton")
    assert stats.select_seconds >= 2.0 > stats.attend_seconds  # two kv heads


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bits_are_subtiles(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    kept = torch.rand(5, 70 // size, generator=g) < 0.5
    words = as_bits(kept, size, 3)
    assert (words.shape, words.dtype) == ((5, 3), torch.int32)
    for at in range(96):
        bit = (words[:, at // 32] >> at % 32 & 1).bool()
        tile = at // size
        assert torch.equal(bit, kept[:, tile] if tile < kept.shape[1] else torch.zeros(5).bool())
