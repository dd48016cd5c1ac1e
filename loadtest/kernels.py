"""The attention op against vLLM's CPU_ATTN and torch's SDPA, interleaved in one process.

    python loadtest/kernels.py --length 16384 --shape smollm2 --shape llama

Every repetition runs all contenders one after the other, so that a noisy machine is noisy for
all of them alike; ratios are of medians. No ratio is given for a result that is wrong.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from vllm_sparse_backend.ops import layout, paged_sparse_attention
from vllm_sparse_backend.ops.cpu import core

PAGE = 128
TOLERANCE = 0.01  # relative L1 against SDPA in fp32 on the rows that are compared
CHECKED_ROWS = 256


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "smollm2": Shape(9, 3, 64),
    "llama": Shape(8, 2, 128),  # a quarter of Llama-3.1-8B's heads
    "gemma": Shape(4, 1, 256),
}


class Case(BaseModel):
    """What one shape and length gave."""

    shape: str
    length: int
    isa: str
    threads: int
    seconds: dict[str, float]  # median, by contender
    gflops: dict[str, float]  # causal dense attention's operations by those seconds
    error: float  # relative L1 of our op
    ratio: float | None  # CPU_ATTN's seconds by ours; None where the error is too large


Contender = Callable[[], torch.Tensor]


def measure(name: str, length: int, dtype: torch.dtype, repeats: int) -> Case:
    """Time one shape at one length: a whole prompt, every tile kept."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    q = torch.randn(length, shape.heads, shape.head_dim).to(dtype)
    k, v = torch.randn(2, length, shape.kv_heads, shape.head_dim).to(dtype)
    contenders = {
        "sparse_prefill": _ours(q, k, v),
        "CPU_ATTN": _cpu_attn(q, k, v),
        "SDPA": _sdpa(q, k, v),
    }
    rows = slice(-CHECKED_ROWS, None)
    truth = _sdpa(q[rows].float(), k.float(), v.float())()
    error = float((contenders["sparse_prefill"]()[rows] - truth).abs().sum() / truth.abs().sum())
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(repeats):
        for contender, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[contender].append(time.perf_counter() - began)
    medians = {contender: statistics.median(times) for contender, times in seconds.items()}
    work = 2 * 2 * shape.heads * shape.head_dim * length * (length + 1) / 2
    return Case(
        shape=name,
        length=length,
        isa=core.active_isa(),
        threads=torch.get_num_threads(),
        seconds=medians,
        gflops={contender: work / median / 1e9 for contender, median in medians.items()},
        error=error,
        ratio=medians["CPU_ATTN"] / medians["sparse_prefill"] if error <= TOLERANCE else None,
    )


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    cache = layout.pack(k, v, "vec", PAGE)
    pages = torch.arange(len(cache), dtype=torch.int32)[None]
    starts = torch.tensor([0, len(q)], dtype=torch.int32)
    lengths = torch.tensor([len(k)], dtype=torch.int32)
    out = torch.empty_like(q)
    policy = {"selector": "dense"}

    def run() -> torch.Tensor:
        paged_sparse_attention(q, cache, pages, starts, lengths, policy, out=out)
        return out

    return run


def _cpu_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    (length, heads, dim), kv_heads = q.shape, k.shape[1]
    isa = _get_attn_isa(q.dtype, PAGE, dim)
    cache = torch.zeros(-(-len(k) // PAGE), kv_heads, 2 * PAGE, dim, dtype=q.dtype)
    keys, values = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k, v, keys, values, torch.arange(len(k)), isa)
    pages = torch.arange(len(cache), dtype=torch.int32)[None]
    starts = torch.tensor([0, length], dtype=torch.int32)
    lengths = torch.tensor([len(k)], dtype=torch.int32)
    out = torch.empty_like(q)

    def run() -> torch.Tensor:
        plan = ops.cpu_attn_get_scheduler_metadata(
            1, heads, kv_heads, dim, lengths, q.dtype, starts, True, -1, isa, True
        )
        ops.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, lengths, dim**-0.5, True, None, -1, pages, 0.0, plan, None
        )
        return out

    return run


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    group = q.shape[1] // k.shape[1]
    # Repeated beforehand: what is timed is the kernel.
    q, k, v = (
        x.transpose(0, 1)[None].contiguous()
        for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    rows, length = q.shape[2], k.shape[2]
    causal = rows == length
    mask = None if causal else torch.ones(rows, length, dtype=torch.bool).tril(length - rows)

    def run() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal
        )
        return out[0].transpose(0, 1)

    return run


def main(
    length: Annotated[list[int], typer.Option(help="Tokens; repeatable.")] = [16384],  # noqa: B006
    shape: Annotated[list[str], typer.Option(help=f"Of {', '.join(SHAPES)}; repeatable.")] = [  # noqa: B006
        "smollm2",
        "llama",
    ],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="0: as many as there are cores.")] = 0,
    repeats: int = 3,
    isa: Annotated[str | None, typer.Option(help="Force an instruction set.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Keep-everything attention: ours, CPU_ATTN's and SDPA's speed, and our error."""
    if threads:
        torch.set_num_threads(threads)
    core.set_isa(isa)
    cases = [measure(s, n, getattr(torch, dtype), repeats) for s in shape for n in length]
    if as_json:
        print(json.dumps([case.model_dump() for case in cases], indent=2))
        return
    table = Table("shape", "tokens", "threads", "isa", "contender", "s", "GFLOP/s", "ratio")
    for case in cases:
        for contender, median in case.seconds.items():
            ratio = case.seconds["CPU_ATTN"] / median
            shown = f"{ratio:.2f}x" if case.ratio is not None else f"error {case.error:.3g}"
            table.add_row(
                case.shape, str(case.length), str(case.threads), case.isa, contender,
                f"{median:.3f}", f"{case.gflops[contender]:.0f}", shown,
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
