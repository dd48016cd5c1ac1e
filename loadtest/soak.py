"""Half an hour of mixed prompts: does anything go wrong, does the server's memory grow?

    python loadtest/soak.py --minutes 30

A server with the sparse backend is started and kept busy by clients that ask short and long
questions, go on with a document that is in the prefix cache, and hang up at any moment. Meanwhile
the resident memory of all its processes is sampled. Fails if a request fails, if the server logs
an error, if nothing was prefilled sparsely, if an answer is another one afterwards than before, or
if memory grows by more than 2% after the warm-up. Writes soak.json and soak.svg. With
`--side dense`, the same of vLLM's own backend: what grows there, too, is not of this package.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from soak_clients import LONG_ANSWER, NAME, REQUEST_SECONDS, SHORT_ANSWER, Client, Load
from soak_memory import Sample, growth, memory, plot
from tqdm import tqdm

from vllm_sparse_backend.demo.ask import Asker, Counts
from vllm_sparse_backend.demo.machine import usable_cores
from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.serve import Server, ServerOptions, Side

BLOCK = 128  # tokens, vLLM's default on CPUs
ERRORS = re.compile(r"\bERROR\b|Traceback|sparse_prefill: .*failed")
KEPT = 20  # messages of errors that are written down


@dataclass(frozen=True)
class Options(ServerOptions):
    """Of a server with a KV cache so small that all of it has been in use when warm."""

    cache_tokens: int = 0

    def arguments(self, side: Side, port: int) -> list[str]:
        """What follows `vllm` on the command line."""
        blocks = str(self.cache_tokens // BLOCK)
        return [*super().arguments(side, port), "--num-gpu-blocks-override", blocks]


def text_tokens(model: str, at_random: bool) -> list[int]:
    """What prompts are cut from: Python's documentation, or, for a model with random weights,
    any tokens that are not the first few, which are special ones."""
    import pydoc_data.topics

    from transformers import AutoConfig, AutoTokenizer

    if at_random:
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        return random.Random(0).choices(range(3, vocabulary), k=100_000)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids: list[int] = AutoTokenizer.from_pretrained(model).encode(text)
    return ids


@dataclass(frozen=True)
class Outcome:
    """What soak.json holds."""

    minutes: float
    warm_up_minutes: float
    requests: dict[str, int]  # by kind, those that ended as they should
    prompt_tokens: int
    counted: Counts
    growth: float  # of the server's resident memory since the warm-up; 0.02: 2%
    growth_by_process: dict[str, float]
    problems: list[str]
    errors: list[str]  # the first of them
    samples: list[Sample]


def watch(server: Server, load: Load, seconds: float, every: float) -> list[Sample]:
    """The memory of the server's processes for so long, at regular times."""
    began, samples = time.monotonic(), []
    with tqdm(total=round(seconds), unit="s", desc="soak") as bar:
        while (now := time.monotonic() - began) < seconds:
            server.check()
            samples.append(Sample(now, load.prompt_tokens, memory(server.session)))
            mib = sum(samples[-1].resident.values()) / 2**20
            requests, errors = sum(load.done.values()), len(load.errors)
            bar.set_postfix_str(f"{requests} requests, {errors} errors, {mib:.0f} MiB")
            bar.update(round(now) - bar.n)
            time.sleep(max(0.0, min(every, seconds - now)))
        bar.update(bar.total - bar.n)
    return samples


def probe(server: Server, prompt: list[int], salt: str) -> list[int]:
    """What a server with nothing else to do answers, with nothing of it in the prefix cache."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=REQUEST_SECONDS) as client:
        answer: Any = client.completions.create(
            model=NAME,
            prompt=prompt,
            max_tokens=SHORT_ANSWER,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True, "cache_salt": salt},
        )
    tokens: list[int] = answer.choices[0].token_ids
    return tokens


def soak(
    side: Side,
    options: Options,
    log: Path,
    seconds: float,
    warm: float,
    clients: int,
    at_random: bool,
) -> Outcome:
    """Start the server, keep it busy, watch it."""
    source = text_tokens(options.model, at_random)
    longest = options.max_model_len - LONG_ANSWER

    load, fixed = Load(), source[: longest * 3 // 4]
    with Server(side, options, log) as server:
        before = probe(server, fixed, "before")
        busy = [
            Client(server.url, random.Random(number), source, longest, load)
            for number in range(clients)
        ]
        for client in busy:
            client.start()
        samples = watch(server, load, seconds, every=min(5.0, seconds / 60))
        for client in busy:
            client.stop.set()
        for client in busy:
            client.join(REQUEST_SECONDS)
        after = probe(server, fixed, "after")
        counted = Asker(server).counts()
    whole, by_process = growth([sample for sample in samples if sample.seconds >= warm])
    problems = []
    if before != after:
        problems.append(f"the same question was answered {before} before and {after} after")
    if load.errors:
        problems.append(f"{len(load.errors)} requests failed, the first: {load.errors[0]}")
    if said := [line for line in log.read_text().splitlines() if ERRORS.search(line)]:
        problems.append(f"the server has logged {len(said)} errors, the first: {said[0]}")
    if side == "sparse" and not counted.sparse_layer_tokens:
        problems.append("nothing was prefilled sparsely")
    used = next(sample.prompt_tokens for sample in samples if sample.seconds >= warm)
    if used < options.cache_tokens:
        problems.append(
            f"want a warm-up of {options.cache_tokens} prompt tokens, in which all of the KV cache "
            f"comes into use, got {used}; give it more minutes"
        )
    return Outcome(
        seconds / 60,
        warm / 60,
        dict(load.done),
        load.prompt_tokens,
        counted,
        whole,
        by_process,
        problems,
        load.errors[:KEPT],
        samples,
    )


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 30.0,
    warm_up: Annotated[
        float | None, typer.Option(help="Minutes that are not judged; a fifth unless given.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1)] = 6,
    model: Annotated[str, typer.Option(help="A folder; SmolLM2 unless given.")] = "",
    profile: Annotated[str, typer.Option(help="A profile other than the one shipped.")] = "",
    max_model_len: int = 8192,
    min_prompt_tokens: Annotated[int, typer.Option(help="From here on prefill is sparse.")] = 2048,
    dtype: str = "bfloat16",
    random_tokens: Annotated[
        bool, typer.Option(help="Prompts of random tokens, for a model with random weights.")
    ] = False,
    side: Annotated[Side, typer.Option(help="dense: what vLLM does by itself.")] = "sparse",
    max_growth: Annotated[float, typer.Option(help="Of memory, after the warm-up.")] = 0.02,
    output: Path = Path("soak"),
) -> None:
    """Mixed prompts at a server with the sparse backend, whose memory must not grow."""
    config: dict[str, Any] = {"min_prompt_tokens": min_prompt_tokens}
    options = Options(
        model=model or str(ensure_model()),
        served_name=NAME,
        max_model_len=max_model_len,
        threads=max(1, usable_cores() - 1),
        kv_gib=1,
        dtype=dtype,
        eager=True,
        sparse_config={**config, "profile": profile} if profile else config,
        cache_tokens=4 * max_model_len,
    )
    warm = minutes / 5 if warm_up is None else warm_up
    if not 0 <= warm < minutes:
        raise typer.BadParameter(
            f"want less than {minutes} minutes, got {warm}", param_hint="warm-up"
        )
    output.mkdir(parents=True, exist_ok=True)
    log = output / "server.log"
    outcome = soak(side, options, log, 60 * minutes, 60 * warm, clients, random_tokens)
    if outcome.growth > max_growth:
        grown = f"memory has grown by {outcome.growth:.1%} since the warm-up, want {max_growth:.1%}"
        outcome = replace(outcome, problems=[*outcome.problems, grown])
    (output / "soak.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    plot(outcome.samples, 60 * warm, output / "soak.svg")
    requests = ", ".join(f"{n} {kind}" for kind, n in sorted(outcome.requests.items()))
    print(f"{requests}; {outcome.prompt_tokens} prompt tokens")
    print(f"memory {outcome.growth:+.2%} since the warm-up; {output}/soak.json, soak.svg")
    for problem in outcome.problems:
        print(f"FAILED: {problem}")
    raise typer.Exit(bool(outcome.problems))


if __name__ == "__main__":
    typer.run(main)
