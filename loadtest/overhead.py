"""What sparse_prefill costs where it does nothing: short prompts, decode, start-up.

    python loadtest/overhead.py --requests 30 --starts 3

Two servers of the demo's model stand side by side, one idle while the other answers, and are asked
in turn: whatever else the machine does, it does to both. Ratios are of medians, with a bootstrap
interval of 95%.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_sparse_backend.demo.machine import usable_cores
from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.serve import Server, ServerOptions, Side
from vllm_sparse_backend.demo.text import build_document

SIDES: tuple[Side, Side] = ("dense", "sparse")
RESAMPLES = 2000
Times = dict[Side, list[float]]


def ask(client: Any, prompt: list[int], tokens: int, salt: str) -> tuple[float, float]:
    """Seconds to the first token, and per token after it."""
    began = time.perf_counter()
    stream = client.completions.create(
        model="model",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "cache_salt": salt},
    )
    arrivals = [time.perf_counter() for _ in stream]
    return arrivals[0] - began, (arrivals[-1] - arrivals[0]) / max(1, len(arrivals) - 1)


def interval(times: Times) -> tuple[float, float, float]:
    """sparse / dense of the medians, and its bootstrap interval over the pairs of requests."""
    draw = random.Random(0)
    pairs = list(zip(times["dense"], times["sparse"], strict=True))
    ratios = []
    for _ in range(RESAMPLES):
        dense, sparse = zip(*draw.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(sparse) / statistics.median(dense))
    ratios.sort()
    whole = statistics.median(times["sparse"]) / statistics.median(times["dense"])
    return whole, ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES)]


def main(
    requests: Annotated[int, typer.Option(help="Pairs of requests.")] = 30,
    prompt_tokens: Annotated[int, typer.Option(help="Below the sparse threshold of 2048.")] = 1024,
    output_tokens: int = 64,
    starts: Annotated[int, typer.Option(help="Pairs of starts; the first starts warm up.")] = 3,
) -> None:
    """TTFT of short prompts, time per token of decode, and start-up: dense against sparse."""
    from openai import OpenAI
    from transformers import AutoTokenizer

    model = ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = ServerOptions(
        model=str(model),
        served_name="model",
        max_model_len=8192,
        threads=max(1, usable_cores() - 1),
        kv_gib=1,
    )
    logs = Path(tempfile.mkdtemp(prefix="overhead-"))
    started: Times = {"dense": [], "sparse": []}
    for number in range(starts + 1):
        for side in SIDES:
            with Server(side, options, logs / f"start-{side}.log") as server:
                if number:
                    started[side].append(server.startup_seconds)
    first: Times = {"dense": [], "sparse": []}
    each: Times = {"dense": [], "sparse": []}
    with ExitStack() as stack:
        clients: dict[Side, Any] = {}
        for side in SIDES:
            server = stack.enter_context(Server(side, options, logs / f"{side}.log"))
            clients[side] = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        for number in track(range(requests + 2), "asking in turn"):
            document = build_document(tokenizer, prompt_tokens, seed=number)
            for side in SIDES if number % 2 else reversed(SIDES):
                ttft, tpot = ask(
                    clients[side], list(document.token_ids), output_tokens, str(number)
                )
                if number >= 2:  # what came before was to warm up
                    first[side].append(ttft)
                    each[side].append(tpot)
                time.sleep(1.2)  # an engine polls for a second after it has answered
    table = Table("", "dense (ms)", "sparse (ms)", "ratio", "95%")
    rows = {f"TTFT, {prompt_tokens} tokens": first, "time per output token": each}
    if starts:
        rows["start-up"] = started
    for name, times in rows.items():
        ratio, low, high = interval(times)
        medians = (f"{1000 * statistics.median(times[side]):.1f}" for side in SIDES)
        table.add_row(name, *medians, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
