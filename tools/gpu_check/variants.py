"""What is compiled: the launch code run for each cell of the launch table, up to the compiler.

Nothing of a launch is repeated here. Each cell runs `ops.triton.run.forward` on tensors without
memory, under a stub driver and with a hook where Triton would compile; the hook keeps what was
asked for, in the form that Triton itself can compile from later, in another process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final

import numpy as np
import torch
from triton import knobs

from tools.gpu_check.stub import stub_driver, target_of
from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES, DTYPES, HEAD_DIMS, packs, padded
from vllm_sparse_backend.ops.triton.run import forward
from vllm_sparse_backend.ops.triton.work import plan_work
from vllm_sparse_backend.selection import AnyPolicy, Mass, Sale, Static

GROUPS: Final = (1, 3, 4, 8)  # q heads per kv head that most models have
HEADS: Final = 24  # q heads, or as many whole groups as fit
QUICK_DIMS: Final = (64, 128)
SOME_DIMS: Final = (64, 96, 128, 256)  # a padded one among them
SOME_PAGES: Final = (64, 528)  # beside 16: of whole products, and where no shift divides
POLICIES: Final[dict[str, tuple[AnyPolicy, ...]]] = {
    "sale": (Sale(),),
    "mass": (Mass(),),
    "both": (Sale(), Mass()),
    "mass 64": (Mass(tile=64),),
    "both 32": (Sale(tile=32), Mass(tile=32)),
    "sale 4": (Sale(bits=4),),
    "sale 8": (Sale(bits=8),),
    "sale fp4": (Sale(bits="fp4"),),
    "mass fp4": (Mass(bits="fp4"),),
    "both 32 fp4": (Sale(bits="fp4", tile=32), Mass(bits="fp4", tile=32)),
    "static": (Static(),),
}
SCORING: Final = ("anchor_rows", "score_tiles")  # kernels for the q heads of a group together
PAGED: Final = ("sum_keys", "code_keys", "anchor_rows", "attend_tiles")  # that read the cache


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer that could be served, and which of its kernels are wanted."""

    arch: str
    head_dim: int
    group: int = 4
    dtype: torch.dtype = torch.bfloat16
    policies: str = "sale"
    page: int = 16
    small: bool = False  # the cache: less than 2 GiB, which AMD's compiler addresses by 32 bits
    only: tuple[str, ...] = ()  # kernels; all unless given

    @property
    def heads(self) -> int:
        """Q heads, a multiple of the group."""
        return max(1, HEADS // self.group) * self.group


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel to compile, and the first cell that launches it."""

    cell: Cell
    module: str
    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    specialization: str  # what `JITFunction.preload` compiles from

    @property
    def name(self) -> str:
        """For people."""
        c = self.cell
        dtype = str(c.dtype).removeprefix("torch.")
        page = f"p{c.page}{' small' if c.small else ''}"
        return f"{self.kernel} {c.arch} {dtype} d{c.head_dim} g{c.group} {c.policies} {page}"


def quick_cells(archs: Iterable[str] = ARCHITECTURES) -> list[Cell]:
    """A few per architecture: what most models are."""
    its = list(archs)
    cells = [Cell(*at) for at in product(its, QUICK_DIMS, GROUPS)]
    return cells + [Cell(arch, 128, policies="sale fp4") for arch in its if packs(arch, "fp4")]


def all_cells(archs: Iterable[str] = ARCHITECTURES) -> list[Cell]:
    """Each axis of the launch table against those that it shares registers or memory with.

    Everything depends on architecture and head_dim. Beside those, with what was found by compiling:

    - `attend_tiles`: dtype, page, size of the cache. A group is one scalar's division there, for
      which neither registers nor shared memory change; nor do they for the number of q heads.
    - `anchor_rows`, `score_tiles`: the rows that are scored together, by the group, and
      whether a power of two; beside it what is computed of them, by the kinds of policies.
      From 256 channels on, and on sm_103, four heads at most are scored together: a group of 8
      has there what one of 4 has.
    - codes of 4, 6 and 8 bits: constants, for the same instructions. 4-bit floats: others.
    """
    return [cell for arch in archs for cell in _cells(arch)]


def _cells(arch: str) -> Iterator[Cell]:
    cell = partial(Cell, arch)
    for dim in HEAD_DIMS:
        eight = padded(dim) < 256 and arch != "sm_103"  # whether so many are scored together
        yield cell(dim)
        yield cell(dim, 1, only=SCORING)
        if eight:
            yield cell(dim, 8, only=SCORING)
        yield cell(dim, 2, only=("anchor_rows",))  # as `score_tiles` is for float32's group of 4
        for dtype in DTYPES[1:]:
            yield cell(dim, dtype=dtype, only=() if dtype == torch.float32 else ("attend_tiles",))
        yield cell(dim, policies="mass")
        for group in (4, 8) if eight else (4,):
            yield cell(dim, group, policies="both 32", only=SCORING)
        if packs(arch, "fp4"):
            for group, policies in product(GROUPS, ("sale fp4", "mass fp4")):
                yield cell(dim, group, policies=policies)
            yield cell(dim, policies="both 32 fp4", only=SCORING)
            for dtype in DTYPES[1:]:
                yield cell(dim, dtype=dtype, policies="sale fp4", only=("code_keys", *SCORING))
            for group in (5, 6, 7) if eight else ():
                yield cell(dim, group, policies="sale fp4", only=SCORING)
            for page in SOME_PAGES:
                yield cell(dim, page=page, policies="sale fp4", only=("code_keys", "anchor_rows"))
            if target_of(arch).backend == "hip":
                yield cell(dim, small=True, policies="sale fp4", only=("code_keys", "anchor_rows"))
        if target_of(arch).backend == "hip":
            yield cell(dim, small=True, only=PAGED)
            for dtype in DTYPES[1:]:
                yield cell(dim, dtype=dtype, small=True, only=("attend_tiles",))
    for dim in SOME_DIMS:
        yield cell(dim, 3, only=SCORING)
        yield cell(dim, dtype=torch.float16, only=("sum_keys", "code_keys", "anchor_rows"))
        yield cell(dim, 1, torch.float32, only=("anchor_rows",))
        yield cell(dim, 1, policies="both 32", only=SCORING)
        for policies in ("both", "mass 64"):
            yield cell(dim, policies=policies, only=SCORING)
        if not packs(arch, "fp4"):
            yield cell(dim, policies="sale fp4", only=("code_keys", *SCORING))
        for page in SOME_PAGES:
            yield cell(
                dim, page=page, only=PAGED if dim == 128 else ("anchor_rows", "attend_tiles")
            )
    for dim in QUICK_DIMS:
        yield cell(dim, 8, policies="mass", only=SCORING)
        for group in (5, 6, 7):
            yield cell(dim, group, only=SCORING)
    yield cell(96, 7, only=SCORING)
    yield cell(128, 3, only=("attend_tiles",))
    yield cell(128, 16, only=SCORING)
    yield cell(128, 2, policies="both 32", only=SCORING)
    if packs(arch, "fp4"):
        for group in (1, 2, 8):
            yield cell(128, group, policies="both 32 fp4", only=SCORING)
        yield cell(128, 2, policies="sale fp4", only=SCORING)
    for policies in ("sale 4", "sale 8"):
        yield cell(128, policies=policies)
    yield cell(128, policies="static")


def variants(cells: Iterable[Cell], context: int = 131072, rows: int = 2048) -> list[Variant]:
    """What the launch code compiles for these cells: each variant once.

    ``context`` tokens, of which the last ``rows`` are a step's. A step's lengths should change
    nothing, or a server would compile amid its work.
    """
    found: dict[tuple[str, str, str], Variant] = {}
    for cell in cells:
        # Without shared memory it is a device of its own, for which nothing is compiled already.
        with stub_driver(cell.arch, shared=0), instead_of_compiling() as asked:
            launch_layer(cell, context, rows)
        for function, data in asked:
            key = cell.arch, function.__name__, data
            if key not in found and (not cell.only or function.__name__ in cell.only):
                found[key] = _variant(cell, function, data)
    return list(found.values())


def _variant(cell: Cell, function: Any, data: str) -> Variant:
    spec = json.loads(data)
    names = [function.arg_names[at[0]] for at in spec["constant_keys"]]
    constants = dict(zip(names, spec["constant_vals"], strict=True))
    warps, stages = spec["options"]["num_warps"], spec["options"]["num_stages"]
    return Variant(cell, function.module, function.__name__, constants, warps, stages, data)


@contextmanager
def instead_of_compiling() -> Iterator[list[tuple[Any, str]]]:
    asked: list[tuple[Any, str]] = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        asked.append((fn.jit_function, compile["specialization_data"]))
        return True  # do not compile

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, keep
    try:
        yield asked
    finally:
        knobs.runtime.jit_cache_hook = before


def launch_layer(cell: Cell, context: int, rows: int) -> None:
    """The launches of one layer. Tensors are as large as real ones, and have no memory."""

    def empty(*shape: int, dtype: torch.dtype = cell.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = empty(rows, cell.heads, cell.head_dim)
    # All of it 8 GiB or more, or 1.5 at most.
    blocks = (1 << (23 if cell.small else 31)) // (cell.page * cell.head_dim)
    forward(
        q,
        empty(blocks, cell.heads // cell.group, cell.page, 2 * cell.head_dim),
        empty(1, -(-context // cell.page), dtype=torch.int32),
        plan_work(np.array([0, rows]), np.array([context]), [0], "meta"),
        PolicyTable.build(_of_heads(cell), cell.heads),
        cell.head_dim**-0.5,
        torch.empty_like(q),
    )


def _of_heads(cell: Cell) -> list[AnyPolicy]:
    kinds = POLICIES[cell.policies]
    return [kinds[head % len(kinds)] for head in range(cell.heads)]
