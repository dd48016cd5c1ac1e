"""Whole engines of vLLM with the sparse backend, against the same engines without it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from _attention import needs_core
from _engine import Answer, Result, Scenario, generate
from _models import token_ids

pytestmark = needs_core

SMALL = {"min_prompt_tokens": 512}
KEEP_ALL = [{"selector": "sale", "tau": 0.0}, {"selector": "dense"}]
SPARSE = {**SMALL, "policy": {"selector": "sale", "tau": 0.02, "sink": 16, "local": 64}}
LOOSE = {"selector": "sale", "tau": 0.08, "sink": 16, "local": 64}
WINDOW = {**SMALL, "policy": {"selector": "static", "sink": 16, "local": 64}}
BUDGET = 0.005  # nats per token of a prompt
LONG = [token_ids(seed, length) for seed, length in enumerate((3000, 1200, 700))]
MIXED = [token_ids(100 + i, length) for i, length in enumerate([2500, 40, 900, 511] * 4)]
FLOAT = {"dtype": "float32"}  # in which ties are so rare that tokens can be compared


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All of this file's engines, in one process."""
    model = str(tiny_llama)
    shared = token_ids(7, 2000)
    twice = [[shared + token_ids(8, 600)], [shared + token_ids(9, 600)]]
    scenarios = {
        "dense": Scenario(model, [LONG, MIXED], "CPU_ATTN", engine=FLOAT),
        **{
            f"keep all {i}": Scenario(
                model, [LONG, MIXED], config={**SMALL, "policy": policy}, engine=FLOAT
            )
            for i, policy in enumerate(KEEP_ALL)
        },
        **{
            f"chunks {size}": Scenario(
                model,
                [LONG],
                config=SPARSE,
                engine={**FLOAT, "max_num_batched_tokens": size, "max_num_seqs": 8},
                prompt_logprobs=True,
            )
            for size in (256, 1000, 2048, 8192)
        },
        "window": Scenario(model, [LONG], config=WINDOW, engine=FLOAT, prompt_logprobs=True),
        "dense logprobs": Scenario(model, [LONG], "CPU_ATTN", engine=FLOAT, prompt_logprobs=True),
        **{
            f"tail {tail}, stride {stride}": Scenario(
                model,
                [LONG[:1]],
                config={**SMALL, "policy": {**LOOSE, "tail": tail, "row_stride": stride}},
                engine={**FLOAT, "max_num_batched_tokens": 1000},
            )
            for tail, stride in ((0, 8), (1000, 8), (0, 1))
        },
        "prefix cache": Scenario(
            model, twice, config=SPARSE, engine={**FLOAT, "enable_prefix_caching": True}
        ),
        "no prefix cache": Scenario(model, twice, config=SPARSE, engine=FLOAT),
        "alone": Scenario(model, [[prompt] for prompt in MIXED], config=SPARSE, engine=FLOAT),
        "together": Scenario(model, [MIXED], config=SPARSE, engine=FLOAT),
        "room": Scenario(model, [MIXED], config=SPARSE, engine=FLOAT, max_tokens=150),
        "no room": Scenario(
            model,
            [MIXED],
            config=SPARSE,
            engine={**FLOAT, "num_gpu_blocks_override": 70, "max_model_len": 4096},
            max_tokens=150,
        ),
    }
    found = generate(list(scenarios.values()), tmp_path_factory.mktemp("engines"))
    return dict(zip(scenarios, found, strict=True))


def _flat(result: Result) -> list[Answer]:
    return list(itertools.chain.from_iterable(result.answers))


def _apart(one: Iterable[float], other: Iterable[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("name", ["keep all 0", "keep all 1"])
def test_keeping_everything_gives_the_dense_answers(results: dict[str, Result], name: str) -> None:
    dense, sparse = _flat(results["dense"]), _flat(results[name])
    assert [answer.tokens for answer in sparse] == [answer.tokens for answer in dense]
    for one, other in zip(dense, sparse, strict=True):
        assert max(_apart(one.logprobs, other.logprobs)) < 1e-3
    assert results[name].layer_tokens["sparse"] > 2 * sum(map(len, LONG)) * 0.8


def test_tiles_are_left_out_where_they_may_be(results: dict[str, Result]) -> None:
    for name in ("keep all 0", "keep all 1"):
        assert results[name].tiles["computed"] == results[name].tiles["causal"] > 0
    assert 0 < results["window"].tiles["computed"] < 0.5 * results["window"].tiles["causal"]


def test_the_dense_engine_counts_nothing(results: dict[str, Result]) -> None:
    assert results["dense"].layer_tokens == {}


def test_counted_layer_tokens_are_all_tokens_times_layers(results: dict[str, Result]) -> None:
    for name in ("keep all 0", "alone", "together"):
        counted = results[name].layer_tokens
        batches = [LONG, MIXED] if name.startswith("keep") else [MIXED]
        prompts = list(itertools.chain.from_iterable(batches))
        # The last token generated is never an input.
        assert sum(counted.values()) == 2 * sum(len(prompt) + 15 for prompt in prompts), name
        assert counted["decode"] == 2 * 15 * len(prompts)


def _error(dense: Answer, other: Answer) -> float:
    """Mean difference of the prompt's logprobs, in nats."""
    apart = _apart(dense.prompt_logprobs, other.prompt_logprobs)
    return sum(apart) / len(apart)


@pytest.mark.parametrize("size", [256, 1000, 2048, 8192])
def test_chunks_of_any_size_are_inside_one_budget(results: dict[str, Result], size: int) -> None:
    dense, chunked = results["dense logprobs"].answers[0], results[f"chunks {size}"].answers[0]
    window = results["window"].answers[0]
    for one, other, alone in zip(dense, chunked, window, strict=True):
        # A q block that a chunk's edge cuts has fewer rows to keep a tile for, hence not equal.
        assert _error(one, other) < BUDGET
        assert _error(one, alone) > BUDGET  # of sink and window without any selection


def test_the_tail_is_that_of_the_prompt_and_not_of_each_chunk(results: dict[str, Result]) -> None:
    none, last, every = (
        results[name].tiles["computed"]
        for name in ("tail 0, stride 8", "tail 1000, stride 8", "tail 0, stride 1")
    )
    # A third of the rows, and those that see most.
    assert 0.3 < (last - none) / (every - none) < 0.7


def test_the_prefix_cache_changes_nothing_but_the_work(results: dict[str, Result]) -> None:
    with_cache, without = _flat(results["prefix cache"]), _flat(results["no prefix cache"])
    assert [answer.cached for answer in without] == [0, 0]
    assert with_cache[0].cached == 0
    assert with_cache[1].cached == 2000 // 128 * 128
    for one, other in zip(with_cache, without, strict=True):
        assert one.tokens == other.tokens
        assert max(_apart(one.logprobs, other.logprobs)) < 0.05


def test_sixteen_requests_at_once_answer_as_each_alone(results: dict[str, Result]) -> None:
    alone, together = _flat(results["alone"]), _flat(results["together"])
    assert len(together) == 16
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


def test_preempted_requests_answer_the_same(results: dict[str, Result]) -> None:
    assert results["room"].preemptions == 0
    assert results["no room"].preemptions > 0
    for one, other in zip(_flat(results["room"]), _flat(results["no room"]), strict=True):
        assert one.tokens == other.tokens


@pytest.mark.all
def test_a_real_model_keeping_everything(smollm2: Path, tmp_path: Path) -> None:
    import pydoc_data.topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer.encode("\n".join(pydoc_data.topics.topics.values())[:30000])
    prompts = [ids[:3000], ids[1000:7000]]
    keep_all = {"policy": {"selector": "sale", "tau": 0.0}}
    dense, sparse = generate(
        [
            Scenario(str(smollm2), [prompts], "CPU_ATTN", engine=FLOAT),
            Scenario(str(smollm2), [prompts], config=keep_all, engine=FLOAT),
        ],
        tmp_path,
    )
    for one, other in zip(_flat(dense), _flat(sparse), strict=True):
        assert one.tokens == other.tokens
        assert max(_apart(one.logprobs, other.logprobs)) < 1e-3


@pytest.mark.all
@pytest.mark.parametrize("size", [1, 2])
def test_two_ranks_answer_as_one(tiny_llama: Path, tmp_path: Path, size: int) -> None:
    dense, sparse = generate(
        [
            Scenario(str(tiny_llama), [LONG], "CPU_ATTN", engine=FLOAT),
            Scenario(
                str(tiny_llama),
                [LONG],
                config={**SMALL, "policy": {"selector": "sale", "tau": 0.0}},
                engine={**FLOAT, "tensor_parallel_size": size},
            ),
        ],
        tmp_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        OMP_NUM_THREADS="1",
    )
    assert [a.tokens for a in _flat(sparse)] == [a.tokens for a in _flat(dense)]
    # Both ranks see every token; it is counted once.
    assert sum(sparse.layer_tokens.values()) == 2 * sum(len(prompt) + 15 for prompt in LONG)
    assert sparse.layer_tokens["sparse"] > sum(map(len, LONG))
