"""Tensor parallel workers, for real, over gloo: each follows its own heads' policies."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _engine import Answer, Result, Scenario, generate
from _models import token_ids
from _parallel import DENSE, FLOAT, HEADS, WHOLE, apart, flat, section, write_profile
from _server import Samples, counted, serve

from vllm_sparse_backend.metrics import read_totals
from vllm_sparse_backend.ops.tiles import Q_BLOCK
from vllm_sparse_backend.profile import load_profile
from vllm_sparse_backend.selection import Static, parse_policy
from vllm_sparse_backend.selection.static import always_kept

pytestmark = needs_core

PROMPTS = [token_ids(seed, length) for seed, length in enumerate((3000, 1200, 700))]
TOKENS = 16
CHUNK = 2048
# Which of a layer's policies every one of its four heads follows, if the mapping is wrong.
WRONG: dict[str, list[int | None]] = {
    "ranks exchanged": [2, 3, 0, 1],
    "the first rank's twice": [0, 1, 0, 1],
}


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """One worker, by what the heads follow."""
    folder = tmp_path_factory.mktemp("alone")
    mappings = {"whole": WHOLE, **WRONG}
    scenarios = [
        Scenario(
            str(tiny_llama),
            [[prompt] for prompt in PROMPTS],
            config=section(folder / f"{number}.json", heads),
            engine=FLOAT,
            max_tokens=TOKENS,
            prompt_logprobs=True,
        )
        for number, heads in enumerate(mappings.values())
    ]
    return dict(zip(mappings, generate(scenarios, folder), strict=True))


@dataclass(frozen=True)
class Pair:
    """What two workers have answered and counted."""

    answers: list[Answer]
    metrics: Samples
    tiles: Any  # int [2, layers, heads]: computed and causal, by the workers' files
    tokens: list[int]  # layer tokens of each worker's own file
    digest: str
    log: str


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A server with a tensor parallel size of 2; ended when this returns."""
    folder = tmp_path_factory.mktemp("pair")
    config = section(folder / "profile.json")
    options = ("--tensor-parallel-size", "2", "--max-num-batched-tokens", str(CHUNK))
    with serve(tiny_llama, config, folder, *options, OMP_NUM_THREADS="1") as server:
        answers = [server.ask(prompt, scored=True, tokens=TOKENS) for prompt in PROMPTS]
        metrics = server.metrics()
        (session,) = server.sessions()
        tiles = read_totals(session).tiles
        tokens = []
        for path in session.glob("*.counters"):
            own = folder / path.stem
            own.mkdir()
            shutil.copy(path, own)
            tokens.append(sum(int(n) for _, n in read_totals(own).of("layer_tokens")))
        log = server.log  # vLLM may call it an error that it is told to end
        assert server.end() == 0
        assert not server.sessions()
    return Pair(answers, metrics, tiles, tokens, load_profile(config["profile"]).digest, log)


def test_two_workers_answer_as_one(pair: Pair, alone: dict[str, Result]) -> None:
    one = flat(alone["whole"])
    assert [answer.tokens for answer in pair.answers] == [answer.tokens for answer in one]
    assert all(len(answer.prompt_logprobs) > 600 for answer in pair.answers)
    assert apart(pair.answers, one) < 1e-3


def test_any_other_mapping_of_heads_answers_otherwise(pair: Pair, alone: dict[str, Result]) -> None:
    for name in WRONG:
        assert apart(pair.answers, flat(alone[name])) > 0.1, name


def tiles_of(policy: dict[str, Any], length: int) -> int:
    """What one head computes of a prompt, in tiles of 16, by the selector's own rule."""
    parsed, total = parse_policy(policy), 0
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        for block in range(start, end, Q_BLOCK):
            stop = min(block + Q_BLOCK, end)
            # While nothing lies beyond a head's window, it keeps all.
            if isinstance(parsed, Static) and end >= parsed.sink + parsed.local + Q_BLOCK:
                total += int(always_kept(parsed, block, stop).sum())
            else:
                total += -(-stop // 16)
    return total


def test_every_global_head_leaves_out_its_own_tiles(pair: Pair) -> None:
    expected = [
        [sum(tiles_of(policy, len(prompt)) for prompt in PROMPTS) for policy in layer]
        for layer in HEADS
    ]
    assert len({count for layer in expected for count in layer}) == 7  # of 8: two are dense
    computed, causal = pair.tiles.tolist()
    assert computed == expected
    assert causal == [[sum(tiles_of(DENSE, len(prompt)) for prompt in PROMPTS)] * 4] * 2


def test_metrics_are_sums_over_the_workers(pair: Pair, alone: dict[str, Result]) -> None:
    one = alone["whole"]
    for kind in ("computed", "causal"):
        assert counted(pair.metrics, "tiles", kind=kind) == one.tiles[kind] > 0
    # Both workers see every token; one counts it.
    everything = 2 * sum(len(prompt) + TOKENS - 1 for prompt in PROMPTS)
    assert sorted(pair.tokens) == [0, everything]
    assert counted(pair.metrics, "layer_tokens") == everything
    assert counted(pair.metrics, "layer_tokens", path="sparse") == one.layer_tokens["sparse"] > 0


def test_the_profile_is_named_once_and_nothing_goes_wrong(pair: Pair) -> None:
    infos = [dict(labels) for (name, labels) in pair.metrics if name.endswith("prefill_info")]
    assert [info["digest"] for info in infos] == [pair.digest]
    lines = [line for line in pair.log.splitlines() if "sparse_prefill: prefill on" in line]
    assert len(lines) == 1
    for word in ("ERROR", "Traceback"):
        assert word not in pair.log


def _real(
    model: Path, profile: Path, size: int, prompts: list[list[int]], folder: Path
) -> tuple[Result, Result]:
    """One worker and ``size``, of a model whose heads are split among them."""
    one, split = (
        Scenario(
            str(model),
            [[prompt] for prompt in prompts],
            config={"min_prompt_tokens": 512, "dense_core": False, "profile": str(profile)},
            engine={**FLOAT, "max_model_len": 4096, "max_num_batched_tokens": 1024, **more},
            max_tokens=8,
            prompt_logprobs=True,
        )
        for more in ({}, {"tensor_parallel_size": size})
    )
    alone, together = generate([one, split], folder, OMP_NUM_THREADS="1")
    return alone, together


def _same(alone: Result, together: Result) -> None:
    assert together.tiles == alone.tiles
    assert 0 < alone.tiles["computed"] < 0.7 * alone.tiles["causal"]
    assert together.layer_tokens == alone.layer_tokens
    assert [a.tokens for a in flat(together)] == [a.tokens for a in flat(alone)]
    assert apart(flat(together), flat(alone)) < 0.01


def _windows(layers: int, heads: int) -> list[list[dict[str, Any]]]:
    """Another window for every head, and for every layer in another order."""
    return [
        [
            DENSE
            if (head + layer) % heads == 0
            else {"selector": "static", "sink": 16, "local": 64 * ((head + layer) % heads)}
            for head in range(heads)
        ]
        for layer in range(layers)
    ]


def _ids(model: Path, count: int) -> list[list[int]]:
    import pydoc_data.topics

    from transformers import AutoTokenizer

    text = "\n".join(pydoc_data.topics.topics.values())[:40000]
    ids = AutoTokenizer.from_pretrained(model).encode(text)
    return [ids[:count], ids[count : 2 * count - 500]]


@pytest.mark.all
def test_nine_heads_split_by_three(smollm2: Path, tmp_path: Path) -> None:
    facts = {"num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    profile = write_profile(tmp_path / "profile.json", _windows(30, 9), **facts)
    _same(*_real(smollm2, profile, 3, _ids(smollm2, 2000), tmp_path))


@pytest.mark.all
def test_four_heads_of_one_kv_head_split_by_two(tmp_path: Path) -> None:
    from vllm_sparse_backend.demo.model import GEMMA3, ModelUnavailable, ensure_model

    try:
        gemma = ensure_model(GEMMA3.name)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    facts = {"num_layers": 18, "num_heads": 4, "num_kv_heads": 1, "head_dim": 256}
    facts |= {"architecture": json.loads((gemma / "config.json").read_text())["architectures"][0]}
    profile = write_profile(tmp_path / "profile.json", _windows(18, 4), **facts)
    _same(*_real(gemma, profile, 2, _ids(gemma, 1500), tmp_path))
