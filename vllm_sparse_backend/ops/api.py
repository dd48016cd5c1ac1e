"""The public ops: check the arguments, resolve the implementation, dispatch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_sparse_backend.ops import checks, layout, reference
from vllm_sparse_backend.ops.policies import AnyPolicies, PolicyTable
from vllm_sparse_backend.ops.stats import AttentionStats, total
from vllm_sparse_backend.ops.tiles import SUBTILE, TileList, causal_tiles, q_blocks

if TYPE_CHECKING:
    from vllm_sparse_backend.ops.triton.work import Work

IMPLS = ("auto", "reference", "cpu", "triton")
PLAIN_BLOCK = 128  # tokens per block where sparse_attention packs a cache of its own


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policies: AnyPolicies = None,
    scale: float | None = None,
    impl: str = "auto",
    prompt_len: int | None = None,
) -> tuple[torch.Tensor, AttentionStats]:
    """Causal attention of one sequence over the tiles its policies keep.

    ``q`` [T, Hq, D] are the last T of the S positions of ``k``, ``v`` [S, Hkv, D]; all three
    bfloat16, float16 or float32; q head h reads kv head ``h // (Hq // Hkv)``. ``policies``:
    None (the uniform default), one policy (an object or its dict), one per q head, or a
    ``PolicyTable``. ``scale``: ``D ** -0.5`` unless given. ``impl``: "reference" (plain
    torch, any D), "cpu" (the compiled core), "triton" (the GPU core), or "auto", which is
    "cpu" for tensors of the host and "triton" for others. ``prompt_len``: of the prompt of which
    this is a chunk, as ``prompt_lens`` of `paged_sparse_attention`; S unless given.

    Returns the output, [T, Hq, D] of q's dtype, and the call's stats. No gradient.

    Raises ValueError for a wrong argument, naming it, and ``core.CoreUnavailable`` where the
    compiled core cannot run; no implementation stands in for another.
    """
    checks.check_plain(q, k, v)
    scale = checks.check_scale(scale, q.shape[2])
    table = PolicyTable.build(policies, q.shape[1])
    impl = _resolve(impl, q)
    if impl == "reference":
        out = q.new_empty(q.shape)
        return out, _reference_into(out, q, k, v, table, scale, prompt_len)
    kv_layout = "strided" if impl == "triton" else "vec"
    cache = layout.pack(k, v, kv_layout, PLAIN_BLOCK)
    return paged_sparse_attention(
        q,
        cache,
        torch.arange(cache.shape[0], dtype=torch.int32, device=q.device)[None],
        torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device),
        torch.tensor([k.shape[0]], dtype=torch.int32, device=q.device),
        table,
        scale=scale,
        kv_layout=kv_layout,
        impl=impl,
        prompt_lens=(
            None
            if prompt_len is None
            else torch.tensor([prompt_len], dtype=torch.int32, device=q.device)
        ),
    )


def paged_sparse_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    policies: AnyPolicies = None,
    *,
    scale: float | None = None,
    requests: Sequence[int] | None = None,
    prompt_lens: torch.Tensor | None = None,
    kv_layout: str = "vec",
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, AttentionStats]:
    """``sparse_attention`` for a batch of R requests whose keys lie in vLLM's paged cache.

    ``q`` [T, Hq, D] holds request r's query tokens in rows ``query_start_loc[r]`` to
    ``query_start_loc[r + 1]`` (int32 [R + 1]): the last of its ``seq_lens[r]`` (int32 [R])
    positions, all of which ``kv_cache`` [num_blocks, Hkv, N, 2*D] holds, position p in block
    ``block_table[r, p // N]`` (int32 [R, max_blocks]). ``kv_layout`` ("vec", "vec16",
    "amx", or "strided" on a GPU) says how a block lies in memory; see ``ops.layout``.
    ``requests``: which of them to compute, all unless given; other requests' rows of ``out``
    stay as they are (zero where ``out`` is not given). ``prompt_lens`` (int32 [R]): the lengths of
    the prompts of which these may be chunks, from whose ends policies' ``tail`` counts;
    ``seq_lens`` unless given. ``out`` [T, Hq, D] must not overlap the inputs.

    The rest, returns and errors: as ``sparse_attention``.
    """
    impl = _resolve(impl, q)
    table, scale, batch = _check_paged(
        q, kv_cache, block_table, query_start_loc, seq_lens, policies, scale, requests, kv_layout
    )
    prompts = checks.check_prompts(prompt_lens, batch, q.device)
    if impl != "reference":
        checks.check_impl_layout(q, kv_layout, impl)
    if out is None:
        out = q.new_empty(q.shape) if batch.covers else q.new_zeros(q.shape)
    else:
        checks.check_out(out, q)
    if impl == "reference":
        parts = []
        for r in batch.requests:
            rows = slice(batch.starts[r], batch.starts[r + 1])
            k, v = layout.unpack(kv_cache, block_table[r], batch.seq_lens[r], kv_layout)
            parts.append(_reference_into(out[rows], q[rows], k, v, table, scale, prompts[r]))
        return out, total(parts, q.shape[1])
    if impl == "triton":
        return out, _triton_into(out, q, kv_cache, block_table, batch, prompts, table, scale)

    from vllm_sparse_backend.ops.cpu import run

    return out, run.forward(
        q,
        kv_cache,
        block_table,
        query_start_loc,
        seq_lens,
        table,
        scale,
        batch.requests,
        kv_layout,
        out,
        None,
        prompts,
    )


def select_tiles(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    policies: AnyPolicies = None,
    *,
    request: int = 0,
    scale: float | None = None,
    prompt_lens: torch.Tensor | None = None,
    kv_layout: str = "vec",
    impl: str = "auto",
) -> TileList:
    """The tiles ``paged_sparse_attention`` computes for one request, for tests and analysis.

    Arguments and errors as there.
    """
    impl = _resolve(impl, q)
    table, scale, batch = _check_paged(
        q, kv_cache, block_table, query_start_loc, seq_lens, policies, scale, [request], kv_layout
    )
    seq_len = batch.seq_lens[request]
    rows = slice(batch.starts[request], batch.starts[request + 1])
    query_len = rows.stop - rows.start
    prompts = checks.check_prompts(prompt_lens, batch, q.device)
    if impl == "reference":
        k, v = layout.unpack(kv_cache, block_table[request], seq_len, kv_layout)
        return _reference_tiles(q[rows], k, v, table, scale, prompts[request])
    checks.check_impl_layout(q, kv_layout, impl)
    num_blocks = len(q_blocks(query_len, seq_len))
    subtiles = torch.zeros(
        q.shape[1], num_blocks, causal_tiles(seq_len, SUBTILE), dtype=torch.uint8
    )
    if impl == "triton":
        from vllm_sparse_backend.ops import triton

        if batch.requests:
            work = _triton_work(batch, prompts, q.device)
            subtiles = triton.select(q, kv_cache, block_table, work, table, scale).cpu()
        return TileList.from_subtiles(subtiles, table.tile_sizes, query_len, seq_len)

    from vllm_sparse_backend.ops.cpu import run

    run.forward(
        q,
        kv_cache,
        block_table,
        query_start_loc,
        seq_lens,
        table,
        scale,
        batch.requests,
        kv_layout,
        q.new_empty(q.shape),
        subtiles,
        prompts,
    )
    return TileList.from_subtiles(subtiles, table.tile_sizes, query_len, seq_len)


def _resolve(impl: str, q: torch.Tensor) -> str:
    """What ``impl`` means for ``q``, which it may take: "reference", "cpu" or "triton"."""
    if impl not in IMPLS:
        raise ValueError(f"impl: want one of {list(IMPLS)}, got {impl!r}")
    checks.check_query(q)
    if impl == "auto":
        impl = "cpu" if q.device.type == "cpu" else "triton"
    if impl == "reference":
        return impl
    if impl == "triton":
        from vllm_sparse_backend.ops import triton

        triton.check_device(q.device)
        head_dims = triton.HEAD_DIMS
    else:
        from vllm_sparse_backend.ops.cpu import core

        if q.device.type != "cpu":
            raise ValueError(f"q: want a CPU tensor for impl {impl!r}, got one on {q.device}")
        head_dims = core.HEAD_DIMS
    if q.shape[2] not in head_dims:
        raise ValueError(f"q: want head_dim in {head_dims} for impl {impl!r}, got {q.shape[2]}")
    return impl


def _check_paged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    policies: AnyPolicies,
    scale: float | None,
    requests: Sequence[int] | None,
    kv_layout: str,
) -> tuple[PolicyTable, float, checks.Batch]:
    checks.check_cache(q, kv_cache, kv_layout)
    batch = checks.check_batch(q, kv_cache, block_table, query_start_loc, seq_lens, requests)
    table = PolicyTable.build(policies, q.shape[1])
    return table, checks.check_scale(scale, q.shape[2]), batch


def _triton_work(batch: checks.Batch, prompts: list[int], device: torch.device) -> Work:
    from vllm_sparse_backend.ops import triton

    starts, seq_lens = np.array(batch.starts), np.array(batch.seq_lens)
    return triton.plan_work(starts, seq_lens, batch.requests, device, np.array(prompts))


def _triton_into(
    out: torch.Tensor,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    batch: checks.Batch,
    prompts: list[int],
    table: PolicyTable,
    scale: float,
) -> AttentionStats:
    """The requests through the GPU core, timed; waits for the device."""
    if not batch.requests:
        return AttentionStats([0] * q.shape[1], [0] * q.shape[1], 0.0, 0.0, 0.0)

    from vllm_sparse_backend.ops import triton

    work, clock = _triton_work(batch, prompts, q.device), triton.Clock(q.device)
    tiles = triton.forward(q, kv_cache, block_table, work, table, scale, out, clock)
    seconds = clock.seconds()
    took = [seconds.get(phase, 0.0) for phase in ("pack", "select", "attend")]
    return AttentionStats(tiles.tolist(), work.causal(table), *took)


def _reference_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: PolicyTable,
    scale: float,
    prompt_len: int | None,
) -> TileList:
    followed = table.followed(len(k))
    return reference.select(q, k, followed, scale, prompt_len, v=v, place=table.place)


def _reference_into(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: PolicyTable,
    scale: float,
    prompt_len: int | None = None,
) -> AttentionStats:
    """One request through the reference, timed."""
    begin = time.perf_counter()
    tiles = _reference_tiles(q, k, v, table, scale, prompt_len)
    middle = time.perf_counter()
    out.copy_(reference.attend(q, k, v, tiles, scale))
    return AttentionStats(
        tiles.computed, tiles.causal, 0.0, middle - begin, time.perf_counter() - middle
    )
