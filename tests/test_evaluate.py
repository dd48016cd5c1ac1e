"""Judging two sides' readings, the command's errors and tables, and whole runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _models import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from vllm_sparse_backend.cli import app
from vllm_sparse_backend.demo.machine import Machine
from vllm_sparse_backend.evaluate.judge import BUCKETS, agreement, judge, likelihood
from vllm_sparse_backend.evaluate.kept import DenseReadings
from vllm_sparse_backend.evaluate.readings import CONTINUED, RESERVE, Counts, Reading
from vllm_sparse_backend.evaluate.results import Evaluation, Row, load_evaluation
from vllm_sparse_backend.evaluate.show import show
from vllm_sparse_backend.evaluate.statistics import exp, mean_interval, student, wilson
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.tasks.catalog import Batch, Task
from vllm_sparse_backend.tasks.items import Item, Question

RUNNER = CliRunner()
FAST = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


# Statistics, against textbook values


@pytest.mark.parametrize(
    ("hits", "asked", "low", "high"),
    [(30, 30, 0.8865, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (380, 380, 0.990, 1.0)],
)
def test_wilsons_interval(hits: int, asked: int, low: float, high: float) -> None:
    assert wilson(hits, asked) == pytest.approx((low, high), abs=5e-4)


def test_nothing_asked_has_no_interval() -> None:
    assert wilson(0, 0) is None


@given(asked=st.integers(1, 1000), data=st.data())
def test_wilsons_interval_holds_the_share(asked: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, asked))
    ends = wilson(hits, asked)
    assert ends is not None and 0 <= ends[0] <= hits / asked <= ends[1] <= 1


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (20, 2.086), (1000, 1.962)],
)
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=3e-3)


def test_the_interval_of_a_mean() -> None:
    assert mean_interval([1.0]) is None
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((0.57735, 4.303 * 0.57735), abs=1e-4)
    spread = mean_interval([1.0, math.nan])
    assert spread is not None and math.isnan(spread[0])
    assert exp(1e6) == math.inf


# Judging


QUESTIONS = (
    Question("door code", (7,), "12345", 0.1),
    Question("pass key", (8,), "67891", 0.9),
)
ASKED = Batch(Task.NEEDLES, "docs", 4, (Item((1, 2, 3, 4), QUESTIONS),) * 2)
SCORED = Batch(Task.TEXT, "code", 2000, (Item(tuple(range(2000)), scored=1000),) * 3)
SPARSE = Counts(sparse_tokens=30, all_tokens=40, computed=20, causal=80)


def _answers(*texts: str, ttft: float = 1.0, counts: Counts = SPARSE) -> Reading:
    return Reading(answers=texts, ttft=ttft, counts=counts)


def asked_row() -> Row:
    dense = [_answers(" 12345.", " 67891", counts=Counts()), _answers(" 12345", " 1")]
    sparse = [_answers(" 12345.", " 999", ttft=0.5), _answers(" 0", " 67891", ttft=0.7)]
    return judge(ASKED, 100, dense, sparse)


def scored_row(growth: float = 0.0) -> Row:
    dense = [Reading(losses=(1.0 + n,) * 1000, continuation=(1, 2, 3, 4)) for n in range(3)]
    sparse = [
        Reading(losses=(1.0 + n + growth,) * 1000, continuation=(1, 2, 3, 4 + n), counts=SPARSE)
        for n in range(3)
    ]
    return judge(SCORED, 2064, dense, sparse)


def evaluation(*rows: Row) -> Evaluation:
    return Evaluation(
        made_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        model="model",
        facts=None,
        dtype="float32",
        threads=2,
        chunk_tokens=2048,
        hf_overrides=None,
        machine=Machine(
            architecture="x86_64",
            features=("avx2",),
            cores=2,
            memory_gib=8,
            system="Linux",
            python="3.11",
            versions={},
        ),
        isa="avx2",
        profile="uniform",
        profile_digest="",
        policies="no profile",
        sparse_config={},
        texts=("Python's help topics",),
        tasks=("needles", "text"),
        lengths=(100, 2064),
        seed=0,
        repeat="vllm-sparse eval",
        rows=rows,
        seconds=1.0,
    )


def test_answers_are_counted_pair_by_pair() -> None:
    row = asked_row()
    found = row.retrieval
    assert found is not None and row.likelihood is None and row.agreement is None
    assert (found.asked, found.dense_right, found.sparse_right) == (4, 3, 2)
    assert (found.both, found.lost, found.gained) == (1, 2, 1)
    assert found.retained == pytest.approx(1 / 3)
    ends = wilson(1, 3)
    assert found.retained_interval and ends
    assert (found.retained_interval.low, found.retained_interval.high) == ends
    assert [(cell.depth, cell.asked, cell.dense_right, cell.sparse_right) for cell in found.depths]
    assert [answer.cold for answer in found.answers] == [True, False] * 2
    assert [answer.document for answer in found.answers] == [0, 0, 1, 1]


def test_the_grid_has_both_sides_by_depth() -> None:
    cells = evaluation(asked_row(), scored_row()).grid("needles")
    assert [(length, cell.depth) for length, cell in cells] == [(100, 0.1), (100, 0.9)]
    assert [(cell.asked, cell.dense_right, cell.sparse_right) for _, cell in cells] == [
        (2, 2, 1),
        (2, 1, 1),
    ]


def test_density_and_ttft_are_the_sparse_sides_counts() -> None:
    row = asked_row()
    assert (row.density, row.sparse_share) == (0.25, 0.75)
    assert (row.dense_ttft_median, row.sparse_ttft_median) == (1.0, 0.6)
    assert scored_row().dense_ttft_median is None


def test_where_nothing_was_sparse_there_is_no_density() -> None:
    nothing = [_answers("", "", counts=Counts())] * 2
    row = judge(ASKED, 100, nothing, nothing)
    assert (row.density, row.sparse_share) == (None, 0.0)
    assert row.retrieval is not None
    assert (row.retrieval.retained, row.retrieval.retained_interval) == (None, None)
    (line,) = evaluation(row, asked_row()).warnings()
    assert line == "needles (docs), 100 tokens: nothing of it was computed sparsely"


def test_equal_losses_are_no_change() -> None:
    found = scored_row().likelihood
    assert found is not None
    assert found.dense_perplexity == found.sparse_perplexity == pytest.approx(math.exp(2))
    assert (found.change_percent, found.error_percent, found.worst_nats) == (0, 0, 0)
    assert [document.dense_nats for document in found.documents] == [1000, 2000, 3000]


def test_the_change_is_of_the_perplexity_with_an_interval_over_documents() -> None:
    dense = [[1.0] * 100] * 3
    sparse = [[1.1] * 100, [1.0] * 100, [1.2] * 100]
    found = likelihood(dense, sparse, first=50)
    assert found.change_percent == pytest.approx(100 * (math.exp(0.1) - 1))
    assert found.change_interval is not None
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.change_interval.low == pytest.approx(100 * (math.exp(0.1 - half) - 1), rel=1e-3)
    assert found.change_interval.high == pytest.approx(100 * (math.exp(0.1 + half) - 1), rel=1e-3)
    alone = likelihood(dense[:1], sparse[:1], first=0)
    assert (alone.error_percent, alone.change_interval) == (None, None)


def test_the_worst_tokens_are_not_lost_in_the_mean() -> None:
    sparse = [[1.0] * 99 + [9.0]]
    found = likelihood([[1.0] * 100], sparse, first=0)
    assert found.worst_nats == 8
    better = likelihood(sparse, [[1.0] * 100], first=0)
    assert better.worst_nats == 0 and better.change_percent < 0


@given(length=st.integers(1, 300), first=st.integers(0, 100))
def test_buckets_cover_every_scored_position_once(length: int, first: int) -> None:
    losses = [[float(n) / length for n in range(length)]] * 2
    buckets = likelihood(losses, losses, first).buckets
    assert len(buckets) == min(BUCKETS, length)
    places = [place for each in buckets for place in range(each.first, each.last + 1)]
    assert places == list(range(first, first + length))
    assert sum(each.tokens for each in buckets) == 2 * length


def test_agreement_ends_at_the_first_token_that_differs() -> None:
    found = agreement([(1, 2, 3, 4)] * 3, [(1, 2, 3, 4), (1, 2, 9, 4), (9, 2, 3, 4)])
    assert [document.agreed for document in found.documents] == [4, 2, 0]
    assert (found.identical, found.continuations, found.agreed_share) == (1, 3, 0.5)


def test_losses_name_what_was_lost() -> None:
    lines = evaluation(asked_row(), scored_row(growth=0.02)).losses()
    assert len(lines) == 3
    assert "needles (docs), 100 tokens: dense found the pass key, 67891" in lines[0]
    assert "sparse answered '999'" in lines[0]
    assert lines[2] == "text (code), 2064 tokens: perplexity rose by 2.02% (more than 1%)"
    assert evaluation(scored_row(growth=0.005)).losses() == []
    assert evaluation(scored_row(growth=-1.0)).losses() == []


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_a_loss_and_survive_the_file(
    broken: float, tmp_path: Path
) -> None:
    made = evaluation(scored_row(growth=broken))
    assert len(made.losses()) == 1
    made.save(tmp_path / "eval.json")
    json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert len(load_evaluation(tmp_path / "eval.json").losses()) == 1


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    made = evaluation(asked_row(), scored_row(growth=0.1))
    made.save(tmp_path / "eval.json")
    assert load_evaluation(tmp_path / "eval.json") == made


def _shown(made: Evaluation) -> str:
    shown = StringIO()
    show(made, Console(file=shown, width=120))
    return shown.getvalue()


def test_the_tables_show_every_task_and_what_was_lost() -> None:
    text = _shown(evaluation(asked_row(), scored_row(growth=0.02)))
    for part in ("needles", "33% (6%-79%)", "text (code)", "+2.02%", "83%, 1/3", "LOST", "2/2 1/2"):
        assert part in text, part
    assert text.count("LOST") == 3
    assert "Nothing is lost." in _shown(evaluation(scored_row()))
    assert max(map(len, text.splitlines()[1:])) <= 120


# The command


def test_help_teaches_every_task_and_option() -> None:
    result = RUNNER.invoke(app, ["eval", "--help"], env=FAST)
    assert result.exit_code == 0
    for task in Task:
        assert f" {task} " in result.output
    for option in (
        "--profile", "--policy", "--text", "--lengths", "--tasks", "--documents", "--seed",
        "--hf-overrides", "--chunk-tokens", "--dtype", "--min-prompt-tokens", "--output", "--json",
        "Exit status", "vllm-sparse eval ./model",
    ):  # fmt: skip
        assert option in result.output, option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "32768"], "length 32768: SmolLM2-135M-Instruct has 8192 positions"),
        (["--lengths", "10"], "length 10: want at least 512"),
        (["--policy", '{"selector": "sale", "tau": 7}'], "sparse_prefill configuration: policy"),
        (["--policy", '{"selector": "static"}', "--profile", "PROFILE"], "not both"),
        (["--profile", "no/such/profile.json"], "no/such/profile.json"),
        (["--text", "no/such/text"], "text no/such/text: No such file"),
        (["--text", "SHORT", "--lengths", "1024"], "want 2880 tokens for 3 documents of 960, got"),
        (["no/such/folder/at/all"], "neither an existing folder nor a hub name"),
        (["."], "is no model folder"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, smollm2: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words only. " * 20)
    profile = tmp_path / "profile.json"
    profile.write_text(PROFILE)
    named = {"SHORT": str(short), "PROFILE": str(profile)}
    arguments = [named.get(argument, argument) for argument in arguments]
    result = RUNNER.invoke(app, ["eval", "--output", str(tmp_path / "out"), *arguments], env=FAST)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4096,many"], "want numbers with commas"),
        (["--tasks", "needle"], "want some of text,copy"),
        (["--policy", "{"], "want JSON"),
        (["--hf-overrides", "[1]"], "want a JSON object"),
        (["--documents", "0"], "--documents"),
    ],
)
def test_bad_options_are_usage_errors(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["eval", *arguments], env=FAST)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr and message in result.stderr


def test_importing_the_command_is_light() -> None:
    script = (
        "import sys, vllm_sparse_backend.evaluate.command\n"
        "sys.exit(', '.join({'torch', 'vllm', 'transformers'} & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# Whole runs, each in a process of its own


PROFILE = json.dumps(
    {
        "format": "vllm-sparse-profile",
        "version": 1,
        "model": {
            "architecture": "LlamaForCausalLM", "num_layers": 2, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 64,
        },
        "policies": {"0": {"*": {"selector": "static", "sink": 16, "local": 64}}},
    }
)  # fmt: skip


def _eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from vllm_sparse_backend.cli import app; app()"
    return subprocess.run(
        [sys.executable, "-c", code, "eval", *arguments, "--dtype", "float32", "--json"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text for the tiny Llama's tokenizer."""
    import random

    source = random.Random(0)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{source.randrange(3, VOCABULARY)}" for _ in range(12000)))
    return path


@needs_core
def test_a_whole_run_of_a_tiny_model(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(PROFILE)
    options = ["--lengths", "1024,2048", "--tasks", "text,copy", "--documents", "2"]
    options += ["--min-prompt-tokens", "512", "--chunk-tokens", "512", "--text", str(words)]
    options += ["--profile", str(profile), "--output", str(tmp_path / "out")]
    done = _eval(str(tiny_llama), *options)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    results = Evaluation.model_validate_json(done.stdout)
    assert load_evaluation(tmp_path / "out" / "eval.json") == results
    assert done.returncode == bool(results.losses())
    assert (results.profile, results.model, results.dtype) == ("profile", "llama", "float32")
    assert results.profile_digest.startswith("sha256:") and results.texts == (str(words),)
    assert [(row.task, row.text, row.length) for row in results.rows] == [
        (task, "text", length) for task in ("text", "copy") for length in (1024, 2048)
    ]
    for row in results.rows:
        assert row.likelihood is not None and row.agreement is not None
        assert row.likelihood.tokens == 2 * ((row.length - RESERVE) // 2)
        assert row.agreement.documents[0].tokens == CONTINUED
        assert row.density is not None and 0 < row.density < 1
        assert 0.4 < row.sparse_share < 1
        # A window of 64 in one of two layers of random weights moves losses, and by little.
        assert 0 < abs(row.likelihood.change_percent) < 20
    (tmp_path / "out" / "eval.json").rename(tmp_path / "first.json")
    (tmp_path / "out" / "eval.json").mkdir()  # results that cannot be written are shown
    again = _eval(str(tiny_llama), *options)  # the dense side is there
    assert again.returncode == 2 and "eval.json: cannot be written (Is a d" in again.stderr
    assert Evaluation.model_validate_json(again.stdout).rows == results.rows
    assert "8 of 8 documents were read for an earlier" in again.stderr
    assert "dense: text (text), 1024 tokens" in again.stderr and "CPU_ATTN" not in again.stderr


def test_dense_readings_are_kept_for_the_same_tokens_and_engine(tmp_path: Path) -> None:
    item = ASKED.items[0]
    reading = Reading(answers=("a", "b"), ttft=1.5)
    kept = DenseReadings(tmp_path, EngineOptions("model", 1024))
    assert kept.load("needles-0", item) is None
    kept.save("needles-0", item, reading)
    assert kept.load("needles-0", item) == reading
    assert kept.load("needles-1", item) is None
    assert kept.load("needles-0", replace(item, token_ids=(9, *item.token_ids))) is None
    assert kept.load("needles-0", replace(item, questions=item.questions[:1])) is None
    for options in (EngineOptions("other", 1024), EngineOptions("model", 1024, dtype="float32")):
        assert DenseReadings(tmp_path, options).load("needles-0", item) is None
    # Room for more changes nothing, but where vLLM chooses LongRoPE's factors by it.
    assert DenseReadings(tmp_path, EngineOptions("model", 2048)).load("needles-0", item) == reading
    (tmp_path / "needles-0.json").write_text('{"key": ')
    assert kept.load("needles-0", item) is None


def test_times_of_an_earlier_run_are_said_to_be() -> None:
    ran = evaluation(asked_row())
    assert "earlier" not in _shown(ran)
    ran = ran.model_copy(update={"dense_kept": 3, "dense_times_kept": 1})
    assert "TTFT: 1 of 2 dense times are of an earlier run\n" in _shown(ran)


@pytest.mark.parametrize("from_hub", [False, True])
def test_an_edited_configuration_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_hub: bool
) -> None:
    folder, model = tmp_path, str(tmp_path)
    if from_hub:  # as its client keeps what it downloads
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        kept, model = tmp_path / "models--org--name", "org/name"
        folder = kept / "snapshots" / "1234"
        folder.mkdir(parents=True)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("1234")
    identities = []
    for rope in ("linear", "yarn", "longrope", "su"):
        config = json.dumps({"rope_scaling": {"type": rope, "factor": 2.0}}, indent=1)
        (folder / "config.json").write_text(config)
        short, long = (EngineOptions(model, length).identity() for length in (4096, 8192))
        assert (short == long) == (rope in ("linear", "yarn"))
        identities.append(json.dumps(short))
    assert len(set(identities)) == 4
    (folder / "config.json").write_text("{}")
    overrides = {"rope_parameters": {"rope_type": "longrope"}}
    short, long = (EngineOptions(model, n, hf_overrides=overrides).identity() for n in (4096, 8192))
    assert short != long


@needs_core
def test_a_profile_of_another_model_stops_before_anything_is_measured(
    tiny_llama: Path, words: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(PROFILE.replace('"num_heads": 4', '"num_heads": 8'))
    options = ["--lengths", "1024", "--tasks", "text", "--documents", "1", "--text", str(words)]
    done = _eval(str(tiny_llama), *options, "--profile", str(profile))
    assert done.returncode == 2
    assert "num_heads: the profile has 8, the model 4" in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


@pytest.mark.all
@needs_core
@pytest.mark.timeout(900)
def test_keeping_everything_loses_nothing_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    options = ["--lengths", "1024", "--documents", "1", "--min-prompt-tokens", "256"]
    policy = '{"selector": "sale", "tau": 0.0}'
    done = _eval(str(smollm2), *options, "--policy", policy, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    results = Evaluation.model_validate_json(done.stdout)
    assert [row.task for row in results.rows] == [
        "text", "text", "copy", "copy", "needles", "multikey", "records", "recall",
    ]  # fmt: skip
    right: dict[str, Any] = {}
    for row in results.rows:
        assert row.density == 1.0
        if row.retrieval is not None:
            assert row.retrieval.lost == row.retrieval.gained == 0
            assert row.dense_ttft and row.sparse_ttft
            right[row.task] = row.retrieval.dense_right / row.retrieval.asked
        if row.likelihood is not None and row.agreement is not None:
            assert abs(row.likelihood.change_percent) < 0.05
            assert row.agreement.identical == 1
    # The questions are ones that the model answers.
    assert right["needles"] >= 0.7 and right["multikey"] >= 0.4 and right["records"] > 0
