"""Compiling ahead of the first request: every kernel that a model's layers will launch."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

import numpy as np
import torch

from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.tiles import Q_BLOCK
from vllm_sparse_backend.ops.triton.kept import KeptCodes, Place
from vllm_sparse_backend.ops.triton.launch import architecture
from vllm_sparse_backend.ops.triton.run import forward
from vllm_sparse_backend.ops.triton.work import plan_work

FAR: Final = 1 << 40  # bytes, of more than a GPU has


def warm_up(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    tables: Iterable[tuple[PolicyTable, KeptCodes | None]],
    device: torch.device,
) -> float:
    """Run each of the ``tables`` over one q block of zeros. Returns the seconds it took.

    A layer's table comes with the codes that it keeps, of prompts that have not begun: those are
    written to. What is compiled depends on the shapes here, on the policies' kinds and bits, and on
    strides only in so far as they are multiples of 16, which those of every supported head_dim are;
    on AMD also on which tensors have 2 GiB or more. There caches of either size are compiled for,
    and codes as they are. (Where a step's own tensors have 2 GiB, the first such step compiles.)
    Raises what Triton does for a kernel that does not compile or does not fit the device.
    """
    begin = time.perf_counter()
    blocks = -(-Q_BLOCK // block_size)
    q = torch.zeros((Q_BLOCK, num_heads, head_dim), dtype=dtype, device=device)
    shape = (blocks, num_kv_heads, block_size, 2 * head_dim)
    caches = [torch.zeros(shape, dtype=dtype, device=device)]
    if architecture().startswith("gfx"):
        far = caches[0].view(shape)
        far.ptr_range = lambda: FAR  # type: ignore[attr-defined]  # which Triton asks first
        caches.append(far)
    block_table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    step = np.array([0, Q_BLOCK]), np.array([Q_BLOCK]), [0], device
    alone = plan_work(*step)
    beside = plan_work(*step, places={0: Place(0, 0, 0, Q_BLOCK, True)})
    out = torch.empty_like(q)
    for table, codes in tables:
        # At any context, since this one is short.
        followed = PolicyTable(table.rows, place=table.place)
        for cache in caches:
            forward(q, cache, block_table, alone, followed, 1.0, out)
            if codes is not None:
                forward(q, cache, block_table, beside, followed, 1.0, out, kept=codes)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
