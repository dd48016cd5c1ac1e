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
from itertools import product
from typing import Any, Final

import numpy as np
import torch
from triton import knobs

from tools.gpu_check.stub import stub_driver
from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES, DTYPES, HEAD_DIMS
from vllm_sparse_backend.ops.triton.run import forward
from vllm_sparse_backend.ops.triton.work import plan_work
from vllm_sparse_backend.selection import AnyPolicy, Mass, Sale

GROUPS: Final = (1, 3, 4, 8)  # q heads per kv head; 24 q heads are a multiple of each
HEADS: Final = 24
QUICK_DIMS: Final = (64, 128)
POLICIES: Final[dict[str, tuple[AnyPolicy, ...]]] = {
    "sale": (Sale(),),
    "mass": (Mass(),),
    "both": (Sale(), Mass()),
    "sale fp4": (Sale(bits="fp4"),),
    "mass fp4": (Mass(bits="fp4"),),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer that could be served."""

    arch: str
    head_dim: int
    group: int = 4
    dtype: torch.dtype = torch.bfloat16
    policies: str = "sale"
    page: int = 16


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
        return f"{self.kernel} {c.arch} {dtype} d{c.head_dim} g{c.group} {c.policies} p{c.page}"


def quick_cells(archs: Iterable[str] = ARCHITECTURES) -> list[Cell]:
    """A few per architecture: what most models are."""
    return [Cell(*at) for at in product(archs, QUICK_DIMS, GROUPS)]


def all_cells(archs: Iterable[str] = ARCHITECTURES) -> list[Cell]:
    """Each axis of the launch table against architecture and head_dim, which bound each other."""
    archs = tuple(archs)
    layers = list(product(archs, HEAD_DIMS))
    other = DTYPES[1:]
    cells = [Cell(arch, dim, group) for (arch, dim), group in product(layers, GROUPS)]
    cells += [Cell(arch, dim, dtype=dtype) for (arch, dim), dtype in product(layers, other)]
    cells += [Cell(arch, dim, policies=p) for (arch, dim), p in product(layers, ("mass", "both"))]
    cells += [Cell(arch, 128, page=page) for arch, page in product(archs, (32, 64, 128))]
    return cells


def variants(cells: Iterable[Cell], context: int = 131072, rows: int = 2048) -> list[Variant]:
    """What the launch code compiles for these cells: each variant once.

    ``context`` tokens, of which the last ``rows`` are a step's. A step's lengths should change
    nothing, or a server would compile amid its work.
    """
    found: dict[tuple[str, str, str], Variant] = {}
    for cell in cells:
        # Without shared memory it is a device of its own, for which nothing is compiled already.
        with stub_driver(cell.arch, shared=0), _instead_of_compiling() as asked:
            launch_layer(cell, context, rows)
        for function, data in asked:
            key = cell.arch, function.__name__, data
            if key not in found:
                found[key] = _variant(cell, function, data)
    return list(found.values())


def _variant(cell: Cell, function: Any, data: str) -> Variant:
    spec = json.loads(data)
    names = [function.arg_names[at[0]] for at in spec["constant_keys"]]
    constants = dict(zip(names, spec["constant_vals"], strict=True))
    warps, stages = spec["options"]["num_warps"], spec["options"]["num_stages"]
    return Variant(cell, function.module, function.__name__, constants, warps, stages, data)


@contextmanager
def _instead_of_compiling() -> Iterator[list[tuple[Any, str]]]:
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

    q = empty(rows, HEADS, cell.head_dim)
    # More than 2 GiB: below that AMD's compiler may address a tensor by 32 bits.
    blocks = (1 << 32) // (cell.page * cell.head_dim)
    forward(
        q,
        empty(blocks, HEADS // cell.group, cell.page, 2 * cell.head_dim),
        empty(1, -(-context // cell.page), dtype=torch.int32),
        plan_work(np.array([0, rows]), np.array([context]), [0], "meta"),
        PolicyTable.build(_of_heads(cell), HEADS),
        cell.head_dim**-0.5,
        torch.empty_like(q),
    )


def _of_heads(cell: Cell) -> list[AnyPolicy]:
    kinds = POLICIES[cell.policies]
    return [kinds[head % len(kinds)] for head in range(HEADS)]
