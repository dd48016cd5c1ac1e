"""Clients that hang up, workers that are killed: what a server owes those who stay."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _engine import Answer
from _models import token_ids
from _server import NAME, Samples, Server, counted, serve

from vllm_sparse_backend.metrics.counters import read_totals

pytestmark = needs_core

CLIENTS = 64
SECTION: dict[str, Any] = {
    "min_prompt_tokens": 512,
    "policy": {"selector": "sale", "tau": 0.02, "sink": 16, "local": 64},
}
OPTIONS = ("--max-num-batched-tokens", "512", "--max-num-seqs", "32", "--max-model-len", "4096")
DOCUMENT = token_ids(1, 1500)  # what several questions share
QUESTIONS = [DOCUMENT + token_ids(2, 300), DOCUMENT + token_ids(3, 700), token_ids(4, 2500)]


@dataclass(frozen=True)
class Round:
    """The questions' answers with nothing in the prefix cache, and once more."""

    cold: list[Answer]
    cached: list[Answer]


def ask_round(server: Server, salt: str) -> Round:
    """One after the other; of what other salts have left in the cache, nothing is found."""
    cold = [server.ask(question, salt=f"{salt}{i}") for i, question in enumerate(QUESTIONS)]
    cached = [server.ask(question, salt=f"{salt}{i}") for i, question in enumerate(QUESTIONS)]
    return Round(cold, cached)


async def storm(server: Server, seed: int) -> tuple[int, int]:
    """`CLIENTS` at once, of which most hang up: before, while or after their prompt is read.

    Returns how many have hung up, and how many got all they asked for.
    """
    from openai import AsyncOpenAI

    draw = random.Random(seed)
    hung_up = answered = 0

    async def one(patience: float, prompt: list[int]) -> None:
        nonlocal hung_up, answered
        # Each with connections of its own: what is closed is closed.
        async with AsyncOpenAI(
            base_url=server.url, api_key="none", max_retries=0, timeout=240
        ) as client:

            async def read() -> None:
                stream = await client.completions.create(
                    model=NAME,
                    prompt=prompt,
                    max_tokens=64,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for _ in stream:
                    pass

            try:
                await asyncio.wait_for(read(), patience)
                answered += 1
            except TimeoutError:
                hung_up += 1

    clients = []
    for number in range(CLIENTS):
        length = draw.choice([30, 600, 1500, 2500])
        shared = DOCUMENT[: draw.choice([0, 400, 1500])]
        prompt = (shared + token_ids(seed + number, 2500))[:length]
        patience = 240.0 if number % 8 == 0 else draw.uniform(0.0, 6.0)
        clients.append(one(patience, prompt))
    await asyncio.gather(*clients)
    return hung_up, answered


def idle(server: Server) -> Samples:
    """/metrics once nothing runs or waits any more."""
    end = time.monotonic() + 120
    while True:
        metrics = server.metrics()
        if not sum(of_vllm(metrics, f"num_requests_{what}") for what in ("running", "waiting")):
            return metrics
        assert time.monotonic() < end, "requests that nobody waits for are still computed"
        time.sleep(0.2)


def of_vllm(metrics: Samples, name: str) -> float:
    return sum(value for (whose, _), value in metrics.items() if whose == f"vllm:{name}")


@dataclass(frozen=True)
class Weathered:
    """A server before and after clients have hung up on it."""

    server: Server
    before: Round
    after: Round
    hung_up: int
    answered: int
    metrics: Samples  # after, idle
    log: str


@pytest.fixture(scope="module")
def weathered(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weathered]:
    folder = tmp_path_factory.mktemp("server")
    with serve(tiny_llama, SECTION, folder, *OPTIONS) as server:
        before = ask_round(server, "before")
        hung_up, answered = asyncio.run(storm(server, 1000))
        metrics = idle(server)
        after = ask_round(server, "after")
        yield Weathered(server, before, after, hung_up, answered, metrics, server.log)


def test_answers_after_are_bit_equal_to_those_before(weathered: Weathered) -> None:
    assert weathered.hung_up > CLIENTS // 3
    assert weathered.answered >= CLIENTS // 8
    assert weathered.after.cold == weathered.before.cold
    assert weathered.after.cached == weathered.before.cached


def test_the_prefix_cache_is_right_afterwards(weathered: Weathered) -> None:
    for answers in (weathered.before, weathered.after):
        assert [answer.cached for answer in answers.cold] == [0] * len(QUESTIONS)
        for question, cold, cached in zip(QUESTIONS, answers.cold, answers.cached, strict=True):
            # vLLM computes the last token, and with it its block, once more.
            assert cached.cached == (len(question) - 1) // 128 * 128
            assert cached.tokens == cold.tokens


def test_nothing_is_held_for_those_who_left(weathered: Weathered) -> None:
    assert of_vllm(weathered.metrics, "kv_cache_usage_perc") == 0
    for word in ("ERROR", "Traceback"):
        assert word not in weathered.log
    assert counted(weathered.metrics, "layer_tokens", path="sparse") > 0
    computed, causal = (
        counted(weathered.metrics, "tiles", kind=kind) for kind in ("computed", "causal")
    )
    assert 0 < computed < causal


def kill_worker(server: Server) -> int:
    """Kill the server's worker, and wait for the server to end. Returns its exit status."""
    found = re.search(r"\(Worker\S* pid=(\d+)\)", server.log)
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    status = server.process.wait(120)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        server.get("/health")
    assert "died unexpectedly" in server.log
    return status


@pytest.mark.all
def test_a_killed_worker_ends_the_server_and_a_restart_counts_from_zero(
    weathered: Weathered, tiny_llama: Path, tmp_path: Path
) -> None:  # the last: it ends the server
    server, folder = weathered.server, weathered.server.folder
    (session,) = server.sessions()
    # What a server leaves behind that is killed as a whole, a while ago.
    left = folder / "vllm-sparse-prefill-left"
    shutil.copytree(session, left)
    assert read_totals(left).summary() != "no tokens were computed"
    os.utime(left, (time.time() - 3600,) * 2)
    with serve(tiny_llama, {}, tmp_path, *OPTIONS, "--attention-backend", "CPU_ATTN") as dense:
        as_vllm_does = kill_worker(dense)
    assert kill_worker(server) == as_vllm_does
    # What was counted is still told, by the process that made the directory.
    assert len([line for line in server.log.splitlines() if "layer tokens sparse" in line]) == 1
    assert not session.exists()

    with serve(tiny_llama, SECTION, folder, *OPTIONS) as restarted:
        assert not left.exists()
        assert len(restarted.sessions()) == 1
        for metric in ("layer_tokens", "tiles"):
            assert counted(restarted.metrics(), metric) == 0
        again = restarted.ask(QUESTIONS[0], salt="restarted")
        assert again == weathered.before.cold[0]
        tokens = counted(restarted.metrics(), "layer_tokens")
        assert tokens == 2 * (len(QUESTIONS[0]) + len(again.tokens) - 1)
