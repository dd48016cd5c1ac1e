"""What sparse_prefill costs where it does nothing: short prompts, decode, start-up.

    python loadtest/overhead.py --pairs 40 --starts 3

Two engines with the demo's model live in one process and are asked in turn: whatever else the
machine does, it does to both. Ratios are of medians, with a bootstrap interval of 95%; of few
pairs, with the range of the pairs' own ratios.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_sparse_backend.demo.machine import usable_cores
from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.serve import BACKENDS, Server, ServerOptions, Side
from vllm_sparse_backend.demo.text import build_document

SIDES: tuple[Side, Side] = ("dense", "sparse")
WARM_UP = 2  # pairs
RESAMPLES = 2000
FEWEST = 8  # pairs; an interval resampled from fewer is their range, whatever it is called
Times = dict[Side, list[float]]


def engines(options: ServerOptions) -> dict[Side, Any]:
    """Both, in this process."""
    os.environ |= options.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM

    return {
        side: LLM(
            options.model,
            attention_backend=BACKENDS[side].upper(),
            enforce_eager=True,
            max_model_len=options.max_model_len,
            max_num_batched_tokens=options.chunk_tokens,
            max_num_seqs=8,
            enable_prefix_caching=False,
            dtype="bfloat16",
        )
        for side in SIDES
    }


def seconds(engine: Any, prompt: list[int], tokens: int) -> float:
    """To read the prompt and write so many tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    engine.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    return time.perf_counter() - began


def in_turn(options: ServerOptions, pairs: int, prompt_tokens: int, tokens: int) -> list[Times]:
    """Seconds of short prefills, and of each of ``tokens`` decoded tokens."""
    from transformers import AutoTokenizer

    document = build_document(
        AutoTokenizer.from_pretrained(options.model), prompt_tokens, seed=0
    ).token_ids
    both = engines(options)
    prefill: Times = {side: [] for side in SIDES}
    decode: Times = {side: [] for side in SIDES}
    for number in track(range(pairs + WARM_UP), "asking in turn"):
        for side in SIDES if number % 2 else reversed(SIDES):
            first = seconds(both[side], list(document), 1)
            each = seconds(both[side], list(document[:16]), tokens) / tokens
            if number >= WARM_UP:
                prefill[side].append(first)
                decode[side].append(each)
    return [prefill, decode]


def start(options: ServerOptions, starts: int) -> Times:
    """Seconds until `vllm serve` answers. The first pair only warms up."""
    logs = Path(tempfile.mkdtemp(prefix="overhead-"))
    started: Times = {side: [] for side in SIDES}
    for number in range(starts + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            with Server(side, options, logs / f"{side}.log") as server:
                if number:
                    started[side].append(server.startup_seconds)
    return started


def interval(times: Times) -> tuple[float, float]:
    """Of sparse / dense of the medians: the bootstrap's over the pairs of requests."""
    draw = random.Random(0)
    pairs = list(zip(times["dense"], times["sparse"], strict=True))
    ratios = []
    for _ in range(RESAMPLES):
        dense, sparse = zip(*draw.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(sparse) / statistics.median(dense))
    ratios.sort()
    return ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES)]


def told(times: Times) -> str:
    """What `interval` found, or, of fewer than `FEWEST` pairs, their range."""
    pairs = list(zip(times["dense"], times["sparse"], strict=True))
    if len(pairs) < FEWEST:
        ratios = [sparse / dense for dense, sparse in pairs]
        return f"{min(ratios):.3f} to {max(ratios):.3f}, the range of {len(pairs)}"
    low, high = interval(times)
    return f"{low:.3f} to {high:.3f}"


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of requests.")] = 40,
    prompt_tokens: Annotated[int, typer.Option(help="Below the sparse threshold of 2048.")] = 1024,
    output_tokens: int = 100,
    starts: Annotated[int, typer.Option(help="Pairs of starts; 0: leave them out.")] = 3,
) -> None:
    """Short prompts, time per token of decode, and start-up: dense against sparse."""
    options = ServerOptions(
        model=str(ensure_model()),
        served_name="model",
        max_model_len=8192,
        threads=max(1, usable_cores() - 1),
        kv_gib=1,
    )
    rows = {"start-up": start(options, starts)} if starts else {}
    prefill, decode = in_turn(options, pairs, prompt_tokens, output_tokens)
    rows |= {f"prefill of {prompt_tokens} tokens": prefill, "decode of a token": decode}
    table = Table("", "dense (ms)", "sparse (ms)", "ratio", "95%")
    for name, times in rows.items():
        dense, sparse = (statistics.median(times[side]) for side in SIDES)
        medians = (f"{1000 * median:.1f}" for median in (dense, sparse))
        table.add_row(name, *medians, f"{sparse / dense:.3f}", told(times))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
