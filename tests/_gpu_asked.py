"""What is asked of Triton's compiler, and of memory, where there is no GPU. Nothing here imports
vLLM: it runs in processes of its own, whose kernels are not interpreted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.gpu_check.stub import stub_driver
from tools.gpu_check.variants import instead_of_compiling
from vllm_sparse_backend.ops import PolicyTable
from vllm_sparse_backend.ops.triton import KeptCodes, plan_works, warm_up
from vllm_sparse_backend.ops.triton import run as launches
from vllm_sparse_backend.ops.triton.heads import heads_of
from vllm_sparse_backend.ops.triton.kept import Place
from vllm_sparse_backend.ops.triton.work import plan_work

META = torch.device("meta")  # tensors that have a size and no memory
Asked = set[tuple[str, str]]  # kernels, and what they are specialized for


@dataclass(frozen=True)
class Layer:
    """Heads, and how keys are kept."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    page: int = 16

    def cache(self, size: int, heads_first: bool = True) -> torch.Tensor:
        """Of at least ``size`` bytes; ``heads_first``: a block's kv heads before its tokens."""
        block = self.kv_heads * self.page * 2 * self.dim
        blocks = -(-size // (block * self.dtype.itemsize))
        inner = (self.kv_heads, self.page) if heads_first else (self.page, self.kv_heads)
        made = torch.empty(blocks, *inner, 2 * self.dim, dtype=self.dtype, device=META)
        made = made if heads_first else made.transpose(1, 2)
        if self.kv_heads > 1:
            return made
        block, _, token, _ = made.stride()  # of one head torch says anything
        return made.as_strided(made.shape, (block, 1, token, 1))


def _asked(arch: str, launch: Callable[[], object]) -> Asked:
    # Without shared memory it is a device of its own, for which nothing is compiled already.
    with stub_driver(arch, shared=0), instead_of_compiling() as asked:
        launch()
    return {(function.__name__, data) for function, data in asked}


def kept_codes(layer: Layer, table: PolicyTable, streams: int, keys: int) -> KeptCodes:
    """Room for the codes of ``streams`` prompts of ``keys`` tokens."""
    return KeptCodes(streams, keys, layer.kv_heads, layer.dim, heads_of(table, META).bits, META)


def warmed(
    arch: str, layer: Layer, tables: Iterable[PolicyTable], kept: tuple[int, int] | None
) -> Asked:
    """What a server's start asks for, which keeps the codes of so many prompts of such a length."""

    def launch() -> None:
        its = [(t, None if kept is None else kept_codes(layer, t, *kept)) for t in tables]
        shape = layer.heads, layer.kv_heads, layer.dim, layer.dtype, layer.page
        warm_up(*shape, its, META)

    return _asked(arch, launch)


def served(
    arch: str,
    layer: Layer,
    tables: Iterable[PolicyTable],
    kept: tuple[int, int] | None,
    cache: int,
    heads_first: bool = True,
) -> Asked:
    """What steps ask for, with a cache of so many bytes: of a long and a short request, a chunk
    whose codes are kept, with a mean of its own and without."""

    def launch() -> None:
        kv_cache = layer.cache(cache, heads_first)
        # As a layer has them: queries beside keys and values.
        width = (layer.heads + 2 * layer.kv_heads) * layer.dim
        both = torch.empty(3000, width, dtype=layer.dtype, device=META)
        q = both[:, : layer.heads * layer.dim].unflatten(1, (layer.heads, layer.dim))
        out = torch.empty(q.shape, dtype=layer.dtype, device=META)
        block_table = torch.empty(64, 8191, dtype=torch.int32, device=META)[1:]
        for table in tables:
            step = np.array([0, 2047, 3000]), np.array([130001, 1000])
            work = plan_work(*step, [0, 1], META, np.array([131000, 1000]))
            launches.forward(q, kv_cache, block_table, work, table, 0.1, out)
            if kept is None:
                continue
            codes = kept_codes(layer, table, *kept)
            for have, new in ((0, True), (2048, False)):
                places = {1: Place(0, 0, have, 512, new)}
                work = plan_work(*step, [1], META, np.array([131000, 9000]), places)
                launches.forward(q, kv_cache, block_table, work, table, 0.1, out, kept=codes)

    return _asked(arch, launch)


class Taken(TorchDispatchMode):
    """The most bytes of tensors made empty or of zeros that there are at a time: workspaces."""

    MAKERS = (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default)

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in self.MAKERS:
            self.now += made.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(made, self._freed, made.nbytes)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def taken(
    arch: str, layer: Layer, table: PolicyTable, lengths: Sequence[tuple[int, int]], most_keys: int
) -> tuple[int, int]:
    """The most bytes that a step takes of requests with such query lengths and contexts, in parts
    of ``most_keys``, lists of one q block at a time; and the most requests of a part."""
    rows, contexts = np.array(lengths).T
    q = torch.empty(int(rows.sum()), layer.heads, layer.dim, dtype=layer.dtype, device=META)
    out = torch.empty_like(q)
    kv_cache = layer.cache(1 << 20)
    block_table = torch.empty(len(rows), 8192, dtype=torch.int32, device=META)
    starts = np.concatenate([[0], rows.cumsum()])
    works = plan_works(starts, contexts, list(range(len(rows))), META, most_keys)
    before, launches.LIST_BYTES = launches.LIST_BYTES, 1  # type: ignore[misc]
    try:
        with stub_driver(arch, shared=0), instead_of_compiling(), Taken() as mode:
            for work in works:
                launches.forward(q, kv_cache, block_table, work, table, 0.1, out)
    finally:
        launches.LIST_BYTES = before  # type: ignore[misc]
    return mode.peak, max(len(work.lengths) for work in works)


def said(layer: Layer, rows: int, keys: int, requests: int) -> int:
    """`workspace`, with lists of one q block at a time."""
    before, launches.LIST_BYTES = launches.LIST_BYTES, 1  # type: ignore[misc]
    try:
        return launches.workspace(rows, keys, layer.heads, layer.kv_heads, layer.dim, requests)
    finally:
        launches.LIST_BYTES = before  # type: ignore[misc]
