"""Run by test_ops_sanitized.py in a process of its own, which has a sanitizer's runtime loaded.

    python _sanitized.py LIBRARY small|full|overrun

Every instruction set that the library can run here, over what its code has branches for; results
are compared with the reference's tiles and with plain attention. Prints the names of what ran.
`overrun` is the proof that a sanitizer looks at all: it has the core write behind a tensor's end.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _attention import (
    BITS,
    DTYPES,
    HEAD_DIMS,
    Paged,
    assert_accurate,
    element_mask,
    make_paged,
    make_qkv,
    run,
)
from _tiles import assert_same_tiles

from vllm_sparse_backend.ops import PolicyTable, TileList, paged_sparse_attention, select_tiles
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static

# (query tokens, tokens of context): one row, ragged, a block's edge, inside blocks, whole
LENGTHS = [(1, 1), (100, 333), (65, 129), (1, 130), (64, 64)]
LAYOUTS = [("vec", 32), ("vec16", 48), ("vec", 128)]
AMX = [("amx", 32), ("amx", 96)]  # bf16 only


def scored(selector: type[Sale | Mass], **more: Any) -> AnyPolicy:
    return selector(sink=16, local=16, tau=0.05, **more)


POLICIES: list[AnyPolicy] = [  # six heads; more of those that score: MORE
    scored(Sale, bits=8, tile=16, tail=0),
    scored(Mass, bits=6, tile=32, row_stride=1, tail=20),
    DENSE,
    Static(sink=5, local=20, growth=0.1, tile=64),
    scored(Sale, bits=4, tile=64, row_stride=8),
    scored(Mass, bits="fp4", tile=16, row_stride=2, tail=0),
]
MORE = [
    scored(selector, bits=bits, tile=tile, row_stride=stride, tail=0)  # type: ignore[arg-type]
    for (selector, bits, tile), stride in zip(
        itertools.product((Sale, Mass), BITS, (16, 32, 64)),
        itertools.cycle((1, 4, 2, 8)),
        strict=False,
    )
]


def attend(paged: Paged, policies: Sequence[AnyPolicy] | PolicyTable) -> torch.Tensor:
    """The op by one and by two threads, into a tensor of its own that nothing lies behind."""
    outs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs.append(paged_sparse_attention(*paged.tensors, policies, kv_layout=paged.kv_layout)[0])
    torch.set_num_threads(1)
    assert torch.equal(outs[0].nan_to_num(), outs[1].nan_to_num())
    return outs[0]


def attend_to(paged: Paged, tiles: TileList) -> torch.Tensor:
    """The tiles that a caller names; only the core's own interface takes them."""
    out = torch.full_like(paged.q, torch.nan)
    scale = paged.q.shape[2] ** -0.5
    table = PolicyTable([DENSE] * paged.q.shape[1])
    core.forward(*paged.tensors, table, scale, [0], paged.kv_layout, out, None, tiles)
    return out


def check(
    dtype: torch.dtype,
    dim: int,
    layout: tuple[str, int],
    kv_heads: int,
    policies: Sequence[AnyPolicy],
    lengths: Sequence[tuple[int, int]],
) -> None:
    """A policy for each of six heads, a batch of requests."""
    batch = [make_qkv(i, *sizes, 6, kv_heads, dim, dtype) for i, sizes in enumerate(lengths)]
    paged = make_paged(batch, *layout)
    out = attend(paged, policies)
    assert torch.equal(out, run(paged, policies, "cpu")[0])
    for r, qkv in enumerate(batch):
        own, other = (
            select_tiles(*paged.tensors, policies, request=r, kv_layout=layout[0], impl=impl)
            for impl in ("cpu", "reference")
        )
        assert_same_tiles(own, other, qkv, policies, dim**-0.5)
        rows = slice(int(paged.query_start_loc[r]), int(paged.query_start_loc[r + 1]))
        assert_accurate(out[rows], qkv, element_mask(own))
        assert_accurate(attend_to(make_paged([qkv], *layout), own), qkv, element_mask(own))


def extremes(dtype: torch.dtype) -> None:
    """Zeros, the largest and the smallest there are, and what is not finite."""
    limits = torch.finfo(dtype)
    for value in (0.0, limits.max, limits.smallest_normal / 4, torch.inf, -torch.inf, torch.nan):
        for everywhere in (False, True):
            q, k, v = make_qkv(1, 70, 140, 6, 2, 64, dtype)
            q[slice(None) if everywhere else 3] = value
            k[slice(None) if everywhere else 60] = -value
            attend(make_paged([(q, k, v)]), POLICIES)


def small() -> None:
    for dtype, dim, layout in zip(
        DTYPES, (64, 80, 256), (("amx", 32), ("vec16", 48), ("vec", 32)), strict=True
    ):
        check(dtype, dim, layout, 2, POLICIES, LENGTHS[:3])
    check(torch.bfloat16, 80, ("vec", 64), 3, MORE[::4], LENGTHS[1:2])
    # Q blocks in pairs; only for what the sanitizers say, since the reference takes a minute.
    attend(make_paged([make_qkv(2, 1030, 8200, 6, 2)]), POLICIES)
    extremes(torch.float16)


def full() -> None:
    turn = 0
    for dtype in DTYPES:
        for dim in HEAD_DIMS:
            layouts = LAYOUTS[turn % 3 :][:1] + AMX[turn % 2 :][: dtype == torch.bfloat16]
            for layout in layouts:
                policies = (POLICIES, MORE[:6], MORE[6:12], MORE[12:18], MORE[18:])[turn % 5]
                check(dtype, dim, layout, (1, 2, 3, 6)[turn // 5 % 4], policies, LENGTHS)
                turn += 1
        extremes(dtype)
    paged = make_paged([make_qkv(5, 100, 300, 6, 2), make_qkv(6, 0, 40, 6, 2)])
    attend(paged, PolicyTable(POLICIES, [0, 400] * 3))
    attend(make_paged([make_qkv(6, 0, 40, 6, 2)]), POLICIES)
    core.peak()


def overrun() -> None:
    """Into an output of a row too few."""
    paged = make_paged([make_qkv(5, 100, 300)])
    table = PolicyTable([DENSE] * 4)
    core.forward(*paged.tensors, table, 0.125, [0], "vec", torch.empty_like(paged.q[1:]), None)


if __name__ == "__main__":
    core.use_library(Path(sys.argv[1]))
    scenario = {"small": small, "full": full, "overrun": overrun}[sys.argv[2]]
    for isa, usable in core.isas().items():
        if usable:
            core.set_isa(isa)
            scenario()
            print(isa, flush=True)
