"""The arguments of the ops, checked once, at the boundary: name, wanted, came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sparse_backend.ops.layout import BLOCK_MULTIPLE

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHANNEL_MULTIPLE = 16  # of head_dim, in every paged layout
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True)
class Batch:
    """What the checks read on their way: the batch's numbers as Python integers."""

    starts: list[int]  # [R + 1] first query row of each request
    seq_lens: list[int]  # [R]
    requests: list[int]  # which of the R to compute: those asked for that have query rows
    covers: bool  # the requests' rows are all of q's


def want(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless ``tensor`` is as described; names in ``shape`` fit any size."""
    fits = len(tensor.shape) == len(shape) and all(
        isinstance(size, str) or size == came
        for size, came in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device != device:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(
            f"{name}: want [{wanted}] {dtype} on {device}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def check_query(q: torch.Tensor) -> None:
    """``q`` is [T, Hq, D] of a supported dtype with adjacent channels."""
    if q.dim() != 3 or q.dtype not in DTYPES or 0 in q.shape[1:]:
        raise ValueError(
            f"q: want [T, Hq, D] of bfloat16, float16 or float32, got {list(q.shape)} {q.dtype}"
        )
    _check_channels("q", q)
    if q.requires_grad and torch.is_grad_enabled():
        raise ValueError("q: want no gradient, the op has none; got requires_grad=True")


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Each kv head serves the same number of q heads."""
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"heads: want q heads divisible by kv heads, got {num_heads} and {num_kv_heads}"
        )


def check_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """``k``, ``v`` are [S, Hkv, D] and q's T rows fit into S."""
    check_query(q)
    want("k", k, ("S", "Hkv", q.shape[2]), q.dtype, q.device)
    want("v", v, tuple(k.shape), q.dtype, q.device)
    check_groups(q.shape[1], k.shape[1])
    if q.shape[0] > k.shape[0]:
        raise ValueError(f"q: want at most the {k.shape[0]} rows of k, got {q.shape[0]}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale to use, ``head_dim ** -0.5`` unless given."""
    if scale is None:
        return float(head_dim**-0.5)
    # With 0 a masked score is 0 * inf; below 0 the largest product is the smallest score. Kernels
    # compute in fp32, in which 1e-50 is 0, too.
    if not _FLOAT32.tiny <= scale <= _FLOAT32.max:
        raise ValueError(f"scale: want a finite number above 0 in float32, got {scale}")
    return float(scale)


def check_out(out: torch.Tensor, q: torch.Tensor) -> None:
    """``out`` can be written in place of a fresh tensor."""
    want("out", out, tuple(q.shape), q.dtype, q.device)
    _check_channels("out", out)


def check_cache(q: torch.Tensor, kv_cache: torch.Tensor, kv_layout: str) -> None:
    """``kv_cache`` is a cache of vLLM's in a layout that is known, for q's heads."""
    if kv_layout not in BLOCK_MULTIPLE:
        raise ValueError(f"kv_layout: want one of {list(BLOCK_MULTIPLE)}, got {kv_layout!r}")
    d = q.shape[2]
    want("kv_cache", kv_cache, ("num_blocks", "Hkv", "N", 2 * d), q.dtype, q.device)
    _, num_kv_heads, n, _ = kv_cache.shape
    check_groups(q.shape[1], num_kv_heads)
    if d % CHANNEL_MULTIPLE:
        raise ValueError(f"q: want head_dim a multiple of {CHANNEL_MULTIPLE}, got {d}")
    if n == 0 or n % BLOCK_MULTIPLE[kv_layout]:
        raise ValueError(
            f"kv_cache: want blocks of a multiple of {BLOCK_MULTIPLE[kv_layout]} tokens "
            f"for kv_layout {kv_layout!r}, got {n}"
        )
    if kv_layout == "strided":
        if kv_cache.stride(3) != 1:
            raise ValueError(f"kv_cache: want adjacent channels, got strides {kv_cache.stride()}")
        return
    # Blocks and heads may lie apart (layers that share one allocation): a region may not.
    if kv_cache.stride(3) != 1 or kv_cache.stride(2) != 2 * d:
        raise ValueError(
            f"kv_cache: want each (block, kv head) contiguous, got strides {kv_cache.stride()}"
        )


def check_impl_layout(q: torch.Tensor, kv_layout: str, impl: str) -> None:
    """``impl`` ("cpu" or "triton") reads ``kv_layout`` for q's dtype, as vLLM uses them."""
    if (kv_layout == "strided") != (impl == "triton"):
        wanted = ["strided"] if impl == "triton" else [x for x in BLOCK_MULTIPLE if x != "strided"]
        raise ValueError(f"kv_layout: want one of {wanted} for impl {impl!r}, got {kv_layout!r}")
    if kv_layout == "amx" and q.dtype != torch.bfloat16:
        raise ValueError(
            f"kv_layout: want 'vec' or 'vec16' with {q.dtype} for impl 'cpu', got 'amx', "
            "which it reads in bfloat16 only"
        )


def check_prompts(
    prompt_lens: torch.Tensor | None, batch: Batch, device: torch.device
) -> list[int]:
    """The length of each request's prompt, [R]: its context's, where it is not given."""
    if prompt_lens is None:
        return batch.seq_lens
    want("prompt_lens", prompt_lens, (len(batch.seq_lens),), torch.int32, device)
    return prompt_lens.tolist()


def check_batch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    requests: Sequence[int] | None,
) -> Batch:
    """The requests' rows lie in q and their pages in the cache.

    Only what will be computed is held to it: a padded batch may carry anything in the
    block table behind a sequence's end, and in requests that are not asked for.
    """
    num_rows = q.shape[0]
    num_blocks, _, block_size, _ = kv_cache.shape
    device = q.device
    want("seq_lens", seq_lens, ("R",), torch.int32, device)
    count = seq_lens.shape[0]
    want("query_start_loc", query_start_loc, (count + 1,), torch.int32, device)
    want("block_table", block_table, (count, "max_blocks"), torch.int32, device)
    if block_table.stride(1) != 1:
        raise ValueError(f"block_table: want contiguous rows, got strides {block_table.stride()}")
    starts: list[int] = query_start_loc.tolist()
    lens: list[int] = seq_lens.tolist()
    if starts[0] < 0 or starts[-1] > num_rows or starts != sorted(starts):
        raise ValueError(
            f"query_start_loc: want it to ascend within the {num_rows} rows of q, got {starts}"
        )
    asked = range(count) if requests is None else requests
    if len(set(asked)) != len(asked) or not all(0 <= r < count for r in asked):
        raise ValueError(f"requests: want distinct numbers below {count}, got {list(asked)}")
    computed = [r for r in asked if starts[r + 1] > starts[r]]
    for r in computed:
        query_len, needed = starts[r + 1] - starts[r], -(-lens[r] // block_size)
        if lens[r] < query_len:
            raise ValueError(f"seq_lens[{r}]: want at least its {query_len} rows, got {lens[r]}")
        if needed > block_table.shape[1]:
            raise ValueError(
                f"block_table: want {needed} columns for the {lens[r]} tokens of request {r}, "
                f"got {block_table.shape[1]}"
            )
        low, high = (int(edge) for edge in block_table[r, :needed].aminmax())
        if low < 0 or high >= num_blocks:
            raise ValueError(
                f"block_table[{r}]: want pages in [0, {num_blocks}), got {low} to {high}"
            )
    rows = sum(starts[r + 1] - starts[r] for r in computed)
    return Batch(starts, lens, computed, rows == num_rows)


def _check_channels(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() and tensor.stride(2) != 1:
        raise ValueError(f"{name}: want adjacent channels, got strides {tensor.stride()}")
