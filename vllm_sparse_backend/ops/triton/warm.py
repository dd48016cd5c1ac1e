"""Compiling ahead of the first request: every kernel that a model's layers will launch."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch

from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.tiles import Q_BLOCK
from vllm_sparse_backend.ops.triton.run import forward
from vllm_sparse_backend.ops.triton.work import plan_work


def warm_up(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    tables: Iterable[PolicyTable],
    device: torch.device,
) -> float:
    """Run each of the ``tables`` once over one q block of zeros. Returns the seconds it took.

    What is compiled depends on the shapes here, on the policies' kinds and bits, and on strides
    only in so far as they are multiples of 16, which those of every supported head_dim are.
    Raises what Triton does for a kernel that does not compile or does not fit the device.
    """
    begin = time.perf_counter()
    blocks = -(-Q_BLOCK // block_size)
    q = torch.zeros((Q_BLOCK, num_heads, head_dim), dtype=dtype, device=device)
    shape = (blocks, num_kv_heads, block_size, 2 * head_dim)
    cache = torch.zeros(shape, dtype=dtype, device=device)
    block_table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    work = plan_work(np.array([0, Q_BLOCK]), np.array([Q_BLOCK]), [0], device)
    out = torch.empty_like(q)
    for table in tables:
        followed = PolicyTable(table.rows)  # at any context, since this one is short
        forward(q, cache, block_table, work, followed, 1.0, out)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
