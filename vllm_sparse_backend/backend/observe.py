"""A look at what layers attend with, while vLLM runs them: for calibration and pictures.

In one process with the engine (`offline.engine`). Costs nothing while nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from vllm_sparse_backend import compat
from vllm_sparse_backend.ops import layout


@dataclass(frozen=True, slots=True)
class Call:
    """One layer in one step that our core has a share of. Tensors are the engine's own, on its
    device: read, do not keep."""

    layer: int  # in the model
    requests: list[int]  # those the core computes; the others go to the base backend
    q: torch.Tensor  # [T, Hq, D], after RoPE
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    kv_layout: str

    def rows(self, request: int = 0) -> torch.Tensor:
        """A request's queries of this step [T, Hq, D], the last T of its context, on the host."""
        first, last = self.query_start_loc[request : request + 2].tolist()
        return self.q[first:last].cpu()

    def keys_values(self, request: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A request's keys and values, copied out of the cache: [S, Hkv, D] each, on the host."""
        k, v = layout.unpack(
            self.kv_cache, self.block_table[request], int(self.seq_lens[request]), self.kv_layout
        )
        return k.cpu(), v.cpu()


Observer: TypeAlias = Callable[[Call], None]
observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Have every layer that can be sparse call `observer` before it attends."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


def show(
    layer_name: str,
    metadata: Any,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    kv_layout: str,
) -> None:
    """Let those who look see a layer's step; ``metadata`` is mixed, of any backend."""
    for observer in observers:
        observer(
            Call(
                layer=compat.layer_index(layer_name),
                requests=metadata.plan.core,
                q=q,
                kv_cache=kv_cache,
                block_table=metadata.block_table,
                query_start_loc=metadata.query_start_loc,
                seq_lens=metadata.seq_lens,
                scale=scale,
                kv_layout=kv_layout,
            )
        )
