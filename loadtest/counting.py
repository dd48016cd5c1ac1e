"""What the counters cost a worker, and the live page an API server.

    python loadtest/counting.py

A worker counts after each layer's attention: measured here with and without the mirror for several
API servers, against that attention alone, which is less than half of a prefill. The page's data are
read and sent through JSON once a second while anybody looks on, in the API server's process.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_sparse_backend.ops import PolicyTable, sparse_attention
from vllm_sparse_backend.selection import UNIFORM_DEFAULT

REPEATS = 2000
SHAPES = {"SmolLM2": (30, 9, 3, 64), "Llama 3 8B": (32, 32, 8, 128), "70B": (80, 64, 8, 128)}


def microseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median of a call's time."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1000


def main(
    rows: Annotated[int, typer.Option(help="Tokens of a step.")] = 2048,
    context: Annotated[int, typer.Option(help="Tokens of context.")] = 4096,
) -> None:
    """Print both tables."""
    from vllm_sparse_backend.backend.plan import make_plan
    from vllm_sparse_backend.backend.start import Setup
    from vllm_sparse_backend.backend.worker import Worker
    from vllm_sparse_backend.config import SparseConfig
    from vllm_sparse_backend.ops.cpu import core
    from vllm_sparse_backend.profile import ModelFacts
    from vllm_sparse_backend.server.source import Source

    plan = make_plan([0, rows], [context], min_query_tokens=64, min_prompt_tokens=2048)
    console = Console()
    table = Table("model", "counting, µs a layer", "mirrored, µs", "attention, ms a layer", "share")
    page = Table("model", "layers x heads", "page's data, ms", "KB")
    torch.manual_seed(0)
    for name, (layers, heads, kv_heads, head_dim) in SHAPES.items():
        facts = ModelFacts(
            architecture="Any", num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim,
        )  # fmt: skip
        worker = Worker(Setup(SparseConfig(), core.active_isa(), None, facts=facts), 0)
        layer = "model.layers.1.attn"
        worker.policies(layer, heads, head_dim)
        policies = PolicyTable([UNIFORM_DEFAULT] * heads)
        q = torch.randn(rows, heads, head_dim).bfloat16()
        k, v = (torch.randn(context, kv_heads, head_dim).bfloat16() for _ in range(2))
        sparse_attention(q, k, v, policies)
        began = time.perf_counter()
        _, stats = sparse_attention(q, k, v, policies)
        took = time.perf_counter() - began

        def count(worker: Worker = worker, policies: PolicyTable = policies) -> None:
            worker.count_plan(plan)
            worker.count_stats(layer, stats, policies, plan.kept)  # noqa: B023

        mirrored = microseconds(count)
        worker.counters._mirror = None
        plain = microseconds(count)
        share = f"{max(plain, mirrored) / took / 1e6:.3%}"
        table.add_row(name, f"{plain:.1f}", f"{mirrored:.1f}", f"{took * 1e3:.1f}", share)
        for cells in range(layers):
            worker.counters.add_tiles(1, cells * heads + np.arange(heads), np.full(heads, 10**9))
        shape = f"{layers} x {heads}"
        page.add_row(name, shape, *_page(Source, worker.counters.path.parent))
    console.print(table, page)


def _page(source: type, directory: Path) -> tuple[str, str]:
    took = microseconds(lambda: source(directory=directory).json(), 20)
    return f"{took / 1e3:.1f}", f"{len(source(directory=directory).json()) / 1e3:.0f}"


if __name__ == "__main__":
    # As where there are several API servers; each increment is then written to a file.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
    typer.run(main)
