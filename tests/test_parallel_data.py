"""Data parallel engines, for real: all of them serve, and /metrics is of all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from _attention import needs_core
from _engine import Answer, Result, Scenario, generate
from _models import token_ids
from _parallel import FLOAT, apart, flat, section
from _server import Samples, counted, serve

from vllm_sparse_backend.metrics import read_totals

pytestmark = [needs_core, pytest.mark.all]  # a server takes most of a minute

ENGINES = 2
PROMPTS = [token_ids(40 + seed, length) for seed, length in enumerate([1500, 700, 900, 40] * 3)]
TOKENS = 16
LAYER_TOKENS = 2 * sum(len(prompt) + TOKENS - 1 for prompt in PROMPTS)


@dataclass(frozen=True)
class Asked:
    """What the engines have answered and counted."""

    answers: list[Answer]
    scrapes: list[Samples]  # one after the other, of whichever API server came to answer
    of_engines: list[int]  # layer tokens that each worker says it has counted
    log: str


@pytest.fixture(scope="module", params=[1, 2], ids="{} API servers".format)
def asked(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("engines")
    options = ["--data-parallel-size", str(ENGINES), "--api-server-count", str(request.param)]
    # So that no two prompts share a step, and answers do not depend on which engine they meet.
    options += ["--max-num-seqs", "1", "--max-num-batched-tokens", "2048"]
    config = section(folder / "profile.json")
    with serve(tiny_llama, config, folder, *options, OMP_NUM_THREADS="1") as server:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: server.ask(prompt, tokens=TOKENS), PROMPTS))
        scrapes = [server.metrics() for _ in range(6)]
        of_engines = []
        (session,) = server.sessions()
        for path in session.glob("*.counters"):
            own = folder / path.stem
            own.mkdir()
            shutil.copy(path, own)
            of_engines.append(sum(int(n) for _, n in read_totals(own).of("layer_tokens")))
        server.end()
        assert not server.sessions()
    yield Asked(answers, scrapes, of_engines, server.log)


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("alone")
    scenario = Scenario(
        str(tiny_llama),
        [[prompt] for prompt in PROMPTS],
        config=section(folder / "profile.json"),
        engine=FLOAT,
        max_tokens=TOKENS,
    )
    (result,) = generate([scenario], folder)
    return result


def test_every_engine_has_served(asked: Asked) -> None:
    assert len(asked.of_engines) == ENGINES
    assert min(asked.of_engines) > 0


def test_whichever_engine_it_is_answers_the_same(asked: Asked, alone: Result) -> None:
    one = flat(alone)
    assert [answer.tokens for answer in asked.answers] == [answer.tokens for answer in one]
    assert apart(asked.answers, one) < 1e-3


def test_metrics_are_sums_over_the_engines(asked: Asked, alone: Result) -> None:
    assert sum(asked.of_engines) == LAYER_TOKENS
    for scrape in asked.scrapes:
        assert counted(scrape, "layer_tokens") == LAYER_TOKENS
        sparse = counted(scrape, "layer_tokens", path="sparse")
        assert sparse == alone.layer_tokens["sparse"] > 0
        for kind in ("computed", "causal"):
            assert counted(scrape, "tiles", kind=kind) == alone.tiles[kind] > 0
        infos = [labels for (name, labels) in scrape if name.endswith("prefill_info")]
        assert len(infos) == 1


def test_nothing_was_said_twice(asked: Asked) -> None:
    lines = [line for line in asked.log.splitlines() if "sparse_prefill: prefill on" in line]
    assert len(lines) == 1
    summaries = [line for line in asked.log.splitlines() if "layer tokens sparse" in line]
    assert len(summaries) == 1
    assert f"of {LAYER_TOKENS} layer tokens" in summaries[0]
