"""Engines whose heads follow list selectors, under everything that cuts and mixes prompts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import needs_core
from _engine import Answer, Result, Scenario, generate
from _models import token_ids
from _parallel import FLOAT, apart, write_profile

from vllm_sparse_backend.ops import PolicyTable
from vllm_sparse_backend.ops.reference import select
from vllm_sparse_backend.selection import AnyPolicy, ListSelector, parse_policy
from vllm_sparse_backend.selection.kept import kept_tiles
from vllm_sparse_backend.selection.view import View

pytestmark = needs_core

LONG = [token_ids(seed, length) for seed, length in enumerate((3000, 1200, 700))]
MIXED = [token_ids(100 + i, length) for i, length in enumerate([2500, 40, 900, 511] * 2)]
WINDOW: dict[str, Any] = {"sink": 16, "local": 64}
STRIDED: dict[str, Any] = {"selector": "strided", "stride": 3, **WINDOW}
# By nothing but positions, so that tiles are the same however a prompt is cut.
LISTED = [
    [STRIDED, {**STRIDED, "stride": 5}, STRIDED, {**STRIDED, "tile": 64}],
    [{"selector": "static", **WINDOW}, STRIDED, {"selector": "dense"}, STRIDED],
]
SCORED = [
    [STRIDED, {"selector": "sale", "tau": 0.02, **WINDOW}, {"selector": "dense"}, STRIDED],
    [{"selector": "mass", "tau": 0.02, **WINDOW}, STRIDED, STRIDED, STRIDED],
]
CHUNKS = (256, 1024, 4096)


def section(path: Path, layers: list[list[dict[str, Any]]]) -> dict[str, Any]:
    profile = str(write_profile(path, layers))
    return {"min_prompt_tokens": 64, "dense_core": False, "profile": profile}


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All of this file's engines, in one process."""
    folder = tmp_path_factory.mktemp("listed")
    model = str(tiny_llama)
    listed = section(folder / "listed.json", LISTED)
    scored = section(folder / "scored.json", SCORED)
    everything = {"min_prompt_tokens": 64, "policy": {**STRIDED, "stride": 1}}
    shared = token_ids(7, 2000)
    twice = [[shared + token_ids(8, 600)], [shared + token_ids(9, 600)]]
    one_by_one = [[prompt] for prompt in LONG]
    scenarios = {
        "dense": Scenario(model, [LONG], "CPU_ATTN", engine=FLOAT),
        "everything": Scenario(model, [LONG], config=everything, engine=FLOAT),
        **{
            f"chunks {size}": Scenario(
                model,
                one_by_one,
                config=listed,
                engine={**FLOAT, "max_num_batched_tokens": size, "max_num_seqs": 8},
                prompt_logprobs=True,
            )
            for size in CHUNKS
        },
        "prefix cache": Scenario(
            model, twice, config=scored, engine={**FLOAT, "enable_prefix_caching": True}
        ),
        "no prefix cache": Scenario(model, twice, config=scored, engine=FLOAT),
        "alone": Scenario(model, [[prompt] for prompt in MIXED], config=scored, engine=FLOAT),
        "together": Scenario(model, [MIXED], config=scored, engine=FLOAT),
    }
    found = generate(list(scenarios.values()), folder)
    return dict(zip(scenarios, found, strict=True))


def flat(result: Result) -> list[Answer]:
    return list(itertools.chain.from_iterable(result.answers))


def by_the_rule(policy: AnyPolicy, head: int, tokens: int) -> tuple[int, int]:
    """Computed and causal 16-key units of one head over a whole prompt."""
    table = PolicyTable([policy])
    size = table.tile_sizes[0] // 16
    if isinstance(policy, ListSelector):
        read: Any = None  # these rules look at nothing
        q = torch.zeros(1, tokens, 1)
        view = View(q, tokens, policy.tile, 1.0, tokens, (head,), 4, 0, read)
        return int(kept_tiles(policy, view).sum()) * size, int(view.causal.sum()) * size
    zeros = torch.zeros(tokens, 1, 16)
    tiles = select(zeros, zeros, [policy], 1.0)
    return tiles.computed[0] * size, tiles.causal[0] * size


def test_keeping_everything_gives_the_dense_answers(results: dict[str, Result]) -> None:
    dense, listed = flat(results["dense"]), flat(results["everything"])
    assert [answer.tokens for answer in listed] == [answer.tokens for answer in dense]
    assert apart(dense, listed) < 1e-3
    tiles = results["everything"].tiles
    assert tiles["computed"] == tiles["causal"]
    assert results["everything"].layer_tokens["sparse"] > sum(map(len, LONG))


@pytest.mark.parametrize("size", CHUNKS)
def test_chunks_of_any_size_compute_the_rules_tiles(results: dict[str, Result], size: int) -> None:
    chunked, whole = results[f"chunks {size}"], results[f"chunks {CHUNKS[-1]}"]
    assert [answer.tokens for answer in flat(chunked)] == [a.tokens for a in flat(whole)]
    assert apart(flat(chunked), flat(whole)) < 1e-3
    wanted = [
        by_the_rule(parse_policy(policy), head, len(prompt))
        for prompt in LONG
        for heads in LISTED
        for head, policy in enumerate(heads)
    ]
    assert chunked.tiles["computed"] == sum(computed for computed, _ in wanted)
    assert chunked.tiles["causal"] == sum(causal for _, causal in wanted)
    assert chunked.tiles["computed"] < 0.7 * chunked.tiles["causal"]


def test_the_prefix_cache_changes_nothing_but_the_work(results: dict[str, Result]) -> None:
    cached, without = flat(results["prefix cache"]), flat(results["no prefix cache"])
    assert cached[1].cached == 2000 // 128 * 128
    assert [answer.tokens for answer in cached] == [answer.tokens for answer in without]
    assert apart(cached, without) < 0.05


def test_requests_together_answer_as_each_alone(results: dict[str, Result]) -> None:
    alone, together = flat(results["alone"]), flat(results["together"])
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    tiles = results["together"].tiles
    assert 0 < tiles["computed"] < 0.8 * tiles["causal"]


@pytest.mark.all
def test_two_ranks_compute_the_tiles_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    config = section(tmp_path / "p.json", LISTED)
    one, two = generate(
        [
            Scenario(
                str(tiny_llama),
                [[prompt] for prompt in LONG],
                config=config,
                engine={**FLOAT, "tensor_parallel_size": size},
            )
            for size in (1, 2)
        ],
        tmp_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        OMP_NUM_THREADS="1",
    )
    assert [answer.tokens for answer in flat(two)] == [answer.tokens for answer in flat(one)]
    assert two.tiles == one.tiles
