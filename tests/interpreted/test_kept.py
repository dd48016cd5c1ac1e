"""Keys' codes kept from one chunk of a prompt to the next, interpreted, against the reference."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from _attention import QKV, make_paged, make_qkv
from _tiles import assert_same_tiles

from vllm_sparse_backend.ops import PolicyTable, TileList, reference
from vllm_sparse_backend.ops.triton import KeptCodes, Shelf, forward, plan_work, run, select
from vllm_sparse_backend.ops.triton import kept as kept_codes
from vllm_sparse_backend.selection import AnyPolicy, Bits, Mass, Sale

POLICIES: list[AnyPolicy] = [
    Sale(sink=16, local=16, tau=0.03, tail=40),
    Mass(sink=16, local=32, tau=0.05, tile=32, tail=0),
]
PAGE, DIM, SCALE = 32, 64, 64**-0.5
STREAMS, MOST = 2, 1000


def poisoned(bits: Iterable[Bits] = (6,)) -> KeptCodes:
    """Where nothing was written, a step that keeps every tile."""
    kept = KeptCodes(STREAMS, MOST, 1, DIM, bits, torch.device("cpu"))
    for codes in kept.by_bits.values():
        codes.ints.fill_(127)
        codes.means.fill_(torch.nan)
        codes.steps.fill_(torch.nan)
    return kept


def one(qkv: QKV, begin: int, end: int) -> QKV:
    """The rows of a chunk, and the keys there are by then."""
    q, k, v = qkv
    return q[begin:end], k[:end], v[:end]


@pytest.mark.parametrize(
    ("bits", "arch"), [((8, 8), "sm_80"), ((4, "fp4"), "sm_80"), ((6, "fp4"), "sm_120")]
)
def test_the_tiles_of_the_reference_chunk_by_chunk(
    bits: tuple[Bits, Bits], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, kept_codes):
        monkeypatch.setattr(module, "architecture", lambda: arch)
    policies = [it.model_copy(update={"bits": n}) for it, n in zip(POLICIES, bits, strict=True)]
    table = PolicyTable(policies)
    kept, shelf = poisoned(set(bits)), Shelf(STREAMS, MOST)
    prompts = [make_qkv(seed, length, length, 2, 1, DIM) for seed, length in ((1, 700), (2, 430))]
    lens = np.array([700, 430])
    steps = [
        ([0], [(0, 150)]),
        ([0, 1], [(150, 300), (0, 200)]),
        ([1, 0], [(200, 330), (300, 700)]),
    ]
    anew: list[bool] = []
    for requests, spans in steps:
        shelf.step()
        batch = [one(prompts[r], *span) for r, span in zip(requests, spans, strict=True)]
        paged = make_paged(batch, "strided", PAGE, seed=len(anew))
        for row, (r, (begin, end)) in enumerate(zip(requests, spans, strict=True)):
            place = shelf.place(r, begin, end, int(lens[r]))
            assert place is not None
            anew.append(place.new_mean)
            work = plan_work(
                paged.query_start_loc.numpy(), paged.seq_lens.numpy(), [row], "cpu",
                lens[requests], {row: place},
            )  # fmt: skip
            found = select(paged.q, paged.kv_cache, paged.block_table, work, table, SCALE, kept)
            own = TileList.from_subtiles(found, table.tile_sizes, end - begin, end)
            q, k, v = batch[row]
            how = int(lens[r]), place.mean_of
            other = reference.select(q, k, policies, SCALE, *how)
            ties = assert_same_tiles(own, other, (q, k, v), policies, SCALE, *how)
            assert ties <= 4 and sum(own.computed) < sum(own.causal)

            out = torch.full_like(paged.q, torch.nan)
            forward(paged.q, paged.kv_cache, paged.block_table, work, table, SCALE, out, kept=kept)
            rows = slice(int(paged.query_start_loc[row]), int(paged.query_start_loc[row + 1]))
            wanted = reference.attend(q, k, v, own, SCALE)
            torch.testing.assert_close(out[rows], wanted, rtol=0.02, atol=0.02)
    assert anew == [True, True, True, True, True]


def test_codes_are_those_of_one_chunk_however_many_there_were() -> None:
    q, k, v = make_qkv(3, 500, 500, 2, 1, DIM)
    table, kept, shelf = PolicyTable(POLICIES), poisoned(), Shelf(STREAMS, MOST)
    for begin, end in ((0, 260), (260, 300), (300, 301), (301, 495)):
        shelf.step()
        paged = make_paged([(q[begin:end], k[:end], v[:end])], "strided", PAGE, seed=end)
        place = shelf.place(5, begin, end, 600)
        assert place is not None and place.have == (0 if end == 260 else begin // 128 * 128)
        starts, lens = np.array([0, end - begin]), np.array([end])
        work = plan_work(starts, lens, [0], "cpu", None, {0: place})
        # What a step has made before is not read again: keys may no longer be what they were.
        cache = paged.kv_cache.clone()
        pages = paged.block_table[0, : place.have // PAGE].long()
        cache[pages, :, :, :DIM] = torch.nan
        out = torch.empty_like(paged.q)
        forward(paged.q, cache, paged.block_table, work, table, SCALE, out, kept=kept)
    fresh, shelf = poisoned(), Shelf(STREAMS, MOST)
    shelf.step()
    place = shelf.place(5, 0, 495, 600)
    assert place is not None
    paged = make_paged([(q[:495], k[:495], v[:495])], "strided", PAGE)
    work = plan_work(np.array([0, 495]), np.array([495]), [0], "cpu", None, {0: place})
    out = torch.empty_like(paged.q)
    forward(paged.q, paged.kv_cache, paged.block_table, work, table, SCALE, out, kept=fresh)
    for mine, other in zip(kept.by_bits[6], fresh.by_bits[6], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_codes_and_work_are_of_one_kind() -> None:
    paged = make_paged([make_qkv(4, 20, 40, 2, 1, DIM)], "strided", PAGE)
    work = plan_work(np.array([0, 20]), np.array([40]), [0], "cpu")
    out, table = torch.empty_like(paged.q), PolicyTable(POLICIES)
    with pytest.raises(ValueError, match="kept: want codes that are kept or None as the work says"):
        forward(
            paged.q, paged.kv_cache, paged.block_table, work, table, SCALE, out, kept=poisoned()
        )
