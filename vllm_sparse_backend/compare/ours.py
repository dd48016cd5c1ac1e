"""The op as the backend calls it, over a cache that outlives the call."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sparse_backend.compare.layer import Layer
from vllm_sparse_backend.ops import (
    AttentionStats,
    PolicyTable,
    TileList,
    paged_sparse_attention,
    select_tiles,
)
from vllm_sparse_backend.ops.tiles import SUBTILE, causal_tiles, q_blocks


class Ours:
    """One step under a layer's policies. ``cache``: at least the step's keys and values, position p
    in block p // N; ``out`` [T, Hq, D]: where the output goes, memory of its own unless given."""

    def __init__(
        self,
        step: Layer,
        table: PolicyTable,
        cache: torch.Tensor,
        kv_layout: str,
        impl: str = "cpu",
        out: torch.Tensor | None = None,
    ) -> None:
        on = step.q.device

        def numbers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=on)

        self._step, self._table = step, table
        self._prompt = step.prompt_len or len(step.k)
        self._tensors = (
            step.q,
            cache,
            torch.arange(len(cache), dtype=torch.int32, device=on)[None],
            numbers(0, len(step.q)),
            numbers(len(step.k)),
        )
        self._how: Any = {
            "scale": step.softmax_scale,
            "impl": impl,
            "kv_layout": kv_layout,
            "prompt_lens": numbers(self._prompt),
        }
        self._out = torch.empty_like(step.q) if out is None else out
        self.stats: list[AttentionStats] = []  # of every run

    def __call__(self) -> torch.Tensor:
        """Run it once more."""
        out, stats = paged_sparse_attention(*self._tensors, self._table, out=self._out, **self._how)
        self.stats.append(stats)
        return out

    def tiles(self) -> TileList:
        """What it computes."""
        return select_tiles(*self._tensors, self._table, **self._how)

    def with_tiles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A run of the compiled core, and what it computed: uint8 [Hq, q blocks, subtiles of 16
        keys], 1 where computed. It counts among `stats`."""
        from vllm_sparse_backend.ops.cpu import run

        rows, context = len(self._step.q), len(self._step.k)
        subtiles = torch.zeros(
            self._step.q.shape[1],
            len(q_blocks(rows, context)),
            causal_tiles(context, SUBTILE),
            dtype=torch.uint8,
        )
        stats = run.forward(
            *self._tensors,
            self._table,
            self._step.softmax_scale,
            [0],
            self._how["kv_layout"],
            self._out,
            subtiles,
            [self._prompt],
        )
        self.stats.append(stats)
        return self._out, subtiles
