"""Engines of vLLM in a process of their own, and what they generated.

Run as a script with a file of scenarios, it starts one engine after the other in its own process,
which takes seconds each where a server takes half a minute. `generate` is the way in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_sparse_backend.config import SESSION_VARIABLE

SECONDS = 560
METRICS = ("layer_tokens", "tiles")


@dataclass(frozen=True)
class Scenario:
    """An engine, and the batches of prompts it gets one after the other."""

    model: str
    batches: list[list[list[int]]]  # of token ids
    backend: str = "sparse_prefill"
    config: dict[str, Any] = field(default_factory=dict)  # the section sparse_prefill
    engine: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 16
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Answer:
    """Of one prompt."""

    tokens: list[int]
    logprobs: list[float]  # of the tokens
    prompt_logprobs: list[float]  # of the prompt's tokens but the first, if asked for
    cached: int  # prompt tokens found in the prefix cache


@dataclass(frozen=True)
class Result:
    """Of one scenario."""

    answers: list[list[Answer]]  # as the scenario's batches
    layer_tokens: dict[str, int]  # by reason, or "sparse" and "keep_all"; without zeros
    tiles: dict[str, int]  # "computed" and "causal"
    preemptions: int


def environment(**more: str) -> dict[str, str]:
    """For any process of vLLM in a test; not in the session of engines in pytest's own process."""
    inherited = {name: value for name, value in os.environ.items() if name != SESSION_VARIABLE}
    return {
        **inherited,
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def generate(scenarios: list[Scenario], folder: Path, **variables: str) -> list[Result]:
    """Run the scenarios in one new process."""
    asked, answered = folder / "scenarios.json", folder / "results.json"
    asked.write_text(json.dumps([asdict(scenario) for scenario in scenarios]))
    done = subprocess.run(
        [sys.executable, __file__, str(asked), str(answered)],
        env=environment(**{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **variables}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return [
        Result(
            [[Answer(**answer) for answer in batch] for batch in result["answers"]],
            result["layer_tokens"],
            result["tiles"],
            result["preemptions"],
        )
        for result in json.loads(answered.read_text())
    ]


def _run(scenario: Scenario, directory: Path | None) -> tuple[Result, Path | None]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_sparse_backend.config import session_directory

    before = {metric: _grown(metric, directory, {}) for metric in METRICS}
    arguments: dict[str, Any] = {
        "attention_backend": scenario.backend,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 2048,
        "disable_log_stats": False,
        **scenario.engine,
    }
    if scenario.backend == "sparse_prefill":
        arguments["additional_config"] = {"sparse_prefill": scenario.config}
    llm = LLM(scenario.model, **arguments)
    parameters = SamplingParams(
        temperature=0,
        max_tokens=scenario.max_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if scenario.prompt_logprobs else None,
        detokenize=False,
    )
    answers = []
    for batch in scenario.batches:
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in batch]
        answers.append([_answer(a) for a in llm.generate(prompts, parameters, use_tqdm=False)])
    preemptions = sum(
        int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    directory = session_directory()
    layer_tokens, tiles = (_grown(metric, directory, before) for metric in METRICS)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return Result(answers, layer_tokens, tiles, preemptions), directory


def _grown(
    metric: str, directory: Path | None, before: dict[str, dict[str, int]]
) -> dict[str, int]:
    """How a metric's counters have grown, by their last label: of what is dense, the reason."""
    from vllm_sparse_backend.metrics import read_totals

    grown = {}
    for labels, value in read_totals(directory).of(metric) if directory else ():
        name = labels[-1] if labels[0] == "dense" else labels[0]
        if more := int(value) - before.get(metric, {}).get(name, 0):
            grown[name] = more
    return grown


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return Answer(
        tokens,
        [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)],
        [
            step[token].logprob
            for step, token in zip(
                output.prompt_logprobs or [], output.prompt_token_ids, strict=False
            )
            if step is not None
        ],
        output.num_cached_tokens or 0,
    )


def main(asked: str, answered: str) -> None:
    results = []
    directory: Path | None = None
    for scenario in json.loads(Path(asked).read_text()):
        result, directory = _run(Scenario(**scenario), directory)
        results.append(asdict(result))
    Path(answered).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
