"""A call of the compiled core, with what list selectors choose before it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.ops.listed import tile_lists
from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.stats import AttentionStats, total


def forward(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    table: PolicyTable,
    scale: float,
    requests: Sequence[int],
    kv_layout: str,
    out: torch.Tensor,
    tiles_out: torch.Tensor | None,
    prompt_lens: Sequence[int],
) -> AttentionStats:
    """As `core.forward`. Requests with list selectors to follow go to the core one by one.

    Their selection is counted with every thread's time, none of which does anything else.
    """
    inputs = q, kv_cache, block_table, query_start_loc, seq_lens, table, scale
    if not table.has_listed:
        counted = core.forward(
            *inputs, requests, kv_layout, out, tiles_out, prompt_lens=prompt_lens
        )
        return AttentionStats(*counted)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    listed = {r: heads for r in requests if (heads := table.listed(lengths[r]))}
    parts = []
    if together := [r for r in requests if r not in listed]:
        counted = core.forward(
            *inputs, together, kv_layout, out, tiles_out, prompt_lens=prompt_lens
        )
        parts.append(AttentionStats(*counted))
    for r, heads in listed.items():
        began = time.perf_counter()
        tiles = tile_lists(
            q[starts[r] : starts[r + 1]],
            kv_cache,
            block_table[r],
            table,
            scale,
            lengths[r],
            prompt_lens[r],
            kv_layout,
        )
        seconds = (time.perf_counter() - began) * torch.get_num_threads()
        counted = core.forward(
            *inputs, [r], kv_layout, out, tiles_out, tiles, prompt_lens, listed=heads
        )
        stats = AttentionStats(*counted)
        parts.append(replace(stats, select_seconds=stats.select_seconds + seconds))
    return total(parts, len(table.rows))
