"""A recorded load test: `python -m loadtest.ab small --repeats 2`, SmolLM2 on one core."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from vllm_sparse_backend.config import SparseConfig

RECORDED = Path(__file__).parent / "loadtest_ab" / "small.json"


def module(name: str) -> Any:
    """One of loadtest/ab; mypy knows it by another name."""
    return importlib.import_module(f"loadtest.ab.{name}")


def recorded() -> tuple[Any, list[Any]]:
    """The setup without its texts, and the turns in the order they were run."""
    record = json.loads(RECORDED.read_text(encoding="utf-8"))
    run, prompts = module("run"), module("prompts")
    workload = module("workload").Workload.model_validate(record["workload"])
    options = run.LoadOptions(
        model="model",
        served_name="SmolLM2-135M-Instruct",
        max_model_len=workload.server.max_model_len,
        threads=1,
    )
    made = tuple(map(prompts.Prompt.model_validate, record["prompts"]))
    dataset = prompts.Dataset(made, ("",) * len(made))
    setup = run.Setup(workload, options, SparseConfig(), 2, dataset)
    done = [
        run.Done(
            run.Turn.model_validate(each["turn"]),
            module("bench").Measured.model_validate(each["measured"]),
        )
        for each in record["turns"]
    ]
    return setup, done
