"""`python -m loadtest.ab` as a user runs it: real servers, the real tool, a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _loadtest_ab import module, recorded
from _models import VOCABULARY

from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.demo.ask import Unexpected
from vllm_sparse_backend.options import Refused

ROOT = Path(__file__).parents[1]
WORKLOAD: dict[str, Any] = {
    "name": "tiny",
    "text": ["words.txt"],
    "server": {"max_model_len": 4096, "eager": True, "max_num_seqs": 4},
    "traffic": {"request_rate": 4, "probe_rate": 2},
    "requests": [
        {"name": "short", "count": 6, "prompt_tokens": [20, 60], "output_tokens": 4},
        {"name": "long", "count": 2, "prompt_tokens": 3000, "output_tokens": 4},
    ],
    "slo": {"ttft_seconds": 5},
}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest.ab", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=560,
    )


@pytest.fixture
def tiny(write: Callable[[str, str], Path]) -> Path:
    """A workload in words that the tiny model's tokenizer knows."""
    words = (f"w{3 + (7 * n + n // 40) % (VOCABULARY - 3)}" for n in range(8000))
    lines = [" ".join(line) for line in zip(*[words] * 40, strict=True)]
    write("words.txt", "\n\n".join(lines))
    return write("tiny.yaml", json.dumps(WORKLOAD))


@pytest.mark.all  # two servers: a minute and a half
@needs_core
def test_dense_and_sparse_are_measured_kept_and_judged(
    tiny: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report"
    shared: list[str | Path] = [
        tiny,
        "--model",
        tiny_llama,
        "--output",
        output,
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    done = command(*shared, "--json", "--min-throughput-ratio", "0.01")
    assert done.returncode == 0, done.stderr
    summary = module("summary").Summary.model_validate_json(done.stdout)
    assert (summary.failed, summary.repeats, summary.slower_of) == (0, 1, 8)
    assert summary.throughput["sparse"].cached_tokens == 0  # nothing was in the cache before
    counters: Any = module("counters")
    dense, sparse = (turn.counters for turn in summary.turns)
    assert not counters.total(dense, counters.LAYER_TOKENS)
    assert counters.total(sparse, counters.LAYER_TOKENS, 'path="sparse"')
    assert [sample.prompt_tokens for sample in summary.samples].count(3000) == 2
    assert summary.wait is not None and set(summary.wait.probe) == {"dense", "sparse"}
    assert (output / "report.html").read_text().startswith("<!DOCTYPE html>")
    made = [path.stat().st_mtime_ns for path in sorted((output / "turns").iterdir())]
    assert len(made) == 4  # two turns, each with the tool's own file

    # Again: nothing is run, another bound is judged.
    again = command(*shared, "--min-throughput-ratio", "1000")
    assert again.returncode == 1, again.stderr
    assert "2 of 2 turns are in" in again.stderr
    assert "CROSSED  min_throughput_ratio" in again.stdout
    assert made == [path.stat().st_mtime_ns for path in sorted((output / "turns").iterdir())]

    # Another workload in the same folder would mix figures that are not comparable.
    tiny.write_text(json.dumps({**WORKLOAD, "seed": 1}))
    other = command(*shared)
    assert other.returncode == 2
    assert "of another workload, model or options; name another folder" in other.stderr


def test_a_dry_run_shows_what_would_run(tiny: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = command(tiny, "--model", tiny_llama, "--output", tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [("bench serve" in line) for line in lines] == [False, True, False, True]
    assert "--attention-backend CPU_ATTN" in lines[0] and "--max-num-seqs 4" in lines[0]
    assert "--attention-backend sparse_prefill" in lines[2]
    assert "--num-prompts 8" in lines[1] and "--probe-request-rate 2.0" in lines[1]
    assert len((tmp_path / "dataset.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "want a .yaml file, or one of chat"),
        (["nosuch.yaml"], "workload nosuch.yaml: No such file"),
        (["small", "--repeats", "0"], "--repeats"),
        (["small", "--policy", "{"], "--policy: want JSON"),
        (["small", "--max-ttft-ratio", "0"], "max_ttft_ratio"),
        (["small", "--profile", "nosuch.json"], "nosuch.json"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = command(*arguments, "--output", tmp_path / "report")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "report").exists()


def test_results_of_other_requests_are_not_taken(tmp_path: Path) -> None:
    bench: Any = module("bench")
    setup, done = recorded()
    path = tmp_path / "bench.json"
    path.write_text(done[0].measured.model_dump_json())
    prompts = setup.dataset.prompts
    assert bench.read_measured(path, prompts) == done[0].measured
    with pytest.raises(Unexpected, match="want 35 requests, got 36"):
        bench.read_measured(path, prompts[1:])
    longer = prompts[0].model_copy(update={"prompt_tokens": prompts[0].prompt_tokens + 1})
    with pytest.raises(Unexpected, match=r"request 0: want \d+ prompt tokens"):
        bench.read_measured(path, (longer, *prompts[1:]))
    path.write_text("{}")
    with pytest.raises(Unexpected, match="not what vllm bench serve writes"):
        bench.read_measured(path, prompts)


def test_an_unfinished_turn_is_run_again_and_a_strange_one_refused(tmp_path: Path) -> None:
    run: Any = module("run")
    setup, done = recorded()
    turns = tmp_path / "turns"
    turns.mkdir()
    (turns / "01-dense.bench.json").write_text(done[0].measured.model_dump_json())
    assert list(run.read_done(setup, tmp_path)) == []  # its turn's file is written last
    turn = done[0].turn.model_copy(update={"fingerprint": setup.fingerprint})
    (turns / "01-dense.turn.json").write_text(turn.model_dump_json())
    assert [each.turn for each in run.read_done(setup, tmp_path)] == [turn]
    (turns / "01-dense.turn.json").write_text("{}")
    with pytest.raises(Refused, match="no turn of this version"):
        list(run.read_done(setup, tmp_path))


def test_what_only_judges_does_not_ask_for_another_run() -> None:
    setup, _ = recorded()

    def fingerprint(**changes: Any) -> str:
        workload = setup.workload.model_copy(update=changes)
        found: str = replace(setup, workload=workload).fingerprint
        return found

    bounds = module("workload").Bounds(max_ttft_ratio=0.5)
    assert fingerprint(bounds=bounds, about="other", short_tokens=99) == setup.fingerprint
    assert fingerprint(seed=9) != setup.fingerprint
    assert replace(setup, profile="sha256:other").fingerprint != setup.fingerprint
    dense = SparseConfig(enabled=False)  # as the environment may say
    assert replace(setup, config=dense).fingerprint != setup.fingerprint


def documented(language: str, word: str) -> str:
    """The block of docs/loadtest.md in a language that has a word in it."""
    text = (ROOT / "docs" / "loadtest.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (block,) = (each for each in blocks if word in each)
    return str(block)


def test_the_documented_workload_is_one(write: Callable[[str, str], Path]) -> None:
    workload: Any = module("workload")
    found = workload.load_workload(str(write("own.yaml", documented("yaml", "name: my-traffic"))))
    assert {each.kind for each in found.requests} == {
        "text", "question", "passages", "shared_prefix",
    }  # fmt: skip
    stated = documented("yaml", "name: my-traffic")
    for model in (workload.Workload, workload.Served, workload.Traffic, workload.Slo):
        assert all(f"{field}:" in stated for field in model.model_fields), model


def test_every_shipped_workload_is_documented() -> None:
    text = (ROOT / "docs" / "loadtest.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in module("workload").shipped())
    assert all(f"`{name}`" in text for name in module("workload").Bounds.model_fields)


def test_the_documented_sweep_runs_both_servers_at_every_rate(tmp_path: Path) -> None:
    block = documented("sh", "bench sweep serve")
    _, _, block = block.partition("--output sweep\n")  # the dataset, which a dry run does not read
    (tmp_path / "sweep").mkdir()
    done = subprocess.run(
        ["bash", "-euc", block.replace("bench sweep serve", "bench sweep serve --dry-run")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    servers = [line for line in done.stdout.splitlines() if line.startswith("Server command")]
    assert ["CPU_ATTN" in line for line in servers] == [True, False]
    assert "'--attention-backend', 'sparse_prefill'" in servers[1]
    for rate in ("0.2", "0.4", "0.8"):
        assert done.stdout.count(f"'--request-rate', '{rate}'") == 2
