"""Every command and block of code in README.md and docs/ is run, or read by what would run it.

A command that no rule here knows fails. What cannot be run here (containers, clusters, other
people's tools) is in `ELSEWHERE`, and of that the files it names are looked for.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from _attention import needs_core
from _command_line import read_serve, unknown_variables
from _docs import REPOSITORY, Block, Command, blocks, commands, heredocs
from _server import NAME, Server, counted, serve
from test_cli import profile_text
from typer.exceptions import TyperException
from typer.testing import CliRunner

from vllm_sparse_backend.cli import app
from vllm_sparse_backend.profile import load_profile

URL = "http://localhost:8000"
# Seconds each, and of a model that is there: these are run and not only read.
QUICK = ("doctor", "estimate", "inspect", "validate")
# Read by nobody here: what runs them is not installed, or does not look at its arguments first.
ELSEWHERE = ("docker", "kubectl", "helm", "serve", "lm_eval", "guidellm", "cat", "export")
# Pages whose Python and JSON have a test of their own.
WITH_TESTS = ("selectors.md",)

OURS = [command for command in commands() if command.words[0] != "curl"]
REQUESTS = [command for command in commands() if command.words[0] == "curl"]


def code(language: str) -> list[Block]:
    return [block for block in blocks(language) if block.page.name not in WITH_TESTS]


@pytest.fixture
def workplace(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take to be there."""
    (tmp_path / "profile.json").write_text(profile_text())
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "document.txt").write_text(" ".join(f"w{3 + i % 500}" for i in range(2500)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Commands, by their first word


def vllm_sparse(command: Command, model: Path) -> None:
    """The command line itself reads it; what takes seconds is run."""
    words = ["./model" if word == "MODEL" else word for word in command.words[1:]]
    root: Any = typer.main.get_command(app)
    with root.make_context("vllm-sparse", list(words)) as context:
        name, sub, rest = root.resolve_command(context, [*context._protected_args, *context.args])
        sub.make_context(name, rest, parent=context)
    if name in QUICK:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert name != "doctor" or re.search(r"layers +0-1 sparse", done.output), done.output


def vllm(command: Command, model: Path) -> None:
    """vLLM's own parsers read it, and our configuration."""
    assert unknown_variables(command.environment) == []
    if command.words[1] == "serve":
        served = read_serve(command.words[2:], command.environment)
        assert served.arguments.model_tag in ("MODEL", "./model")
        # Whatever is ours is on a line that asks for us.
        assert served.sparse or "additional-config" not in " ".join(command.words)
        return
    assert command.words[1:4] == ["bench", "sweep", "serve"]
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.sweep.serve import SweepServeArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    sweep: Any = SweepServeArgs.add_cli_args(FlexibleArgumentParser(allow_abbrev=False))
    asked = sweep.parse_args(command.words[4:])
    read_serve(shlex.split(asked.serve_cmd)[2:])
    bench = FlexibleArgumentParser(allow_abbrev=False)
    add_cli_args(bench)
    bench.parse_args(shlex.split(asked.bench_cmd)[3:])
    assert [json.loads(text) for text in heredocs(command.block)]


def make(command: Command, model: Path) -> None:
    """The target is there."""
    done = subprocess.run(
        ["make", "--dry-run", *command.words[1:]],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def python(command: Command, model: Path) -> None:
    """The script's own options read it."""
    words = command.words[1:]
    if words[:2] == ["-m", "venv"]:
        return
    if words[0] == "-m":
        module, rest = importlib.import_module(f"{words[1]}.__main__"), words[2:]
    else:
        script, rest = REPOSITORY / words[0], words[1:]
        assert script.is_file()
        if script.parent.name != "loadtest":
            done = subprocess.run([sys.executable, str(script), *rest, "--help"], check=False)
            assert done.returncode == 0
            return
        module = importlib.import_module(script.stem)
    scripts = typer.Typer()
    scripts.command()(module.main)
    typer.main.get_command(scripts).make_context("script", list(rest))


def pip(command: Command, model: Path) -> None:
    """Our extras are there. Other people's packages are theirs."""
    options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for word in command.words[2:]:
        match = re.fullmatch(r"vllm-sparse-backend(?:\[(.*)\])?", word)
        extras = match[1].split(",") if match and match[1] else []
        assert set(extras) <= options["optional-dependencies"].keys(), word


def elsewhere(command: Command, model: Path) -> None:
    """Files and build stages that it names are there."""
    for word in command.words:
        if word.split("/")[0] in ("deploy", "docs", "loadtest", "tools"):
            assert (REPOSITORY / word).exists(), word
    words = " ".join(command.words)
    if match := re.search(r"docker build .*--target (\S+)", words):
        assert f" AS {match[1]}\n" in (REPOSITORY / "Dockerfile").read_text()
    if match := re.search(r"--file (\S+) --profile (\S+)", words):
        services = yaml.safe_load((REPOSITORY / match[1]).read_text())["services"]
        assert match[2] in {name for service in services.values() for name in service["profiles"]}
    if match := re.search(r"--kustomize (\S+)", words):
        assert (REPOSITORY / match[1] / "kustomization.yaml").is_file()


def script(command: Command, model: Path) -> None:
    """bash can read it, and run it."""
    path = REPOSITORY / command.words[0]
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


RULES: dict[str, Callable[[Command, Path], None]] = {
    "vllm-sparse": vllm_sparse,
    "vllm": vllm,
    "make": make,
    "python": python,
    "python3": python,
    "pip": pip,
    "figures.sh": script,
    **dict.fromkeys(ELSEWHERE, elsewhere),
}


@needs_core
@pytest.mark.parametrize("command", OURS, ids=lambda command: command.name)
def test_commands(
    command: Command, workplace: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "loadtest"))
    program = Path(command.words[0]).name
    assert program in RULES, f"no rule here for {command.words[0]!r}; see the top of this file"
    assert all(part[0] in ("grep", "tee") for part in command.pipe)
    RULES[program](command, tiny_llama)


@pytest.mark.parametrize(
    "words",
    [
        ["vllm", "serve", "MODEL", "--attention-backend", "sparse"],
        ["vllm-sparse", "doctor", "--models", "MODEL"],
        ["vllm-sparse", "diagnose"],
        ["make", "demonstration"],
        ["python", "-m", "loadtest.ab", "small", "--repeat", "3"],
        ["pip", "install", "vllm-sparse-backend[gpu]"],
        ["docker", "build", "--target", "rocm", "."],
        ["kubectl", "apply", "--kustomize", "deploy/nowhere"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_would_be_seen(words: list[str], workplace: Path, tiny_llama: Path) -> None:
    command = Command(Block(REPOSITORY / "README.md", 1, "sh", ""), words)
    with pytest.raises((AssertionError, ValueError, TyperException)):
        RULES[words[0]](command, tiny_llama)


# Requests, sent to one server


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    # High: random weights spread attention over every tile.
    section = {"policy": {"selector": "sale", "tau": 0.2}}
    folder = tmp_path_factory.mktemp("server")
    options = ["--chat-template", template, "--max-num-batched-tokens", "2048"]
    with serve(tiny_llama, section, folder, *options) as started:
        yield started


def adapted(text: str, server: Server) -> str:
    """Of a page, with this server's address and model in it."""
    return text.replace(URL, f"http://127.0.0.1:{server.port}").replace("MODEL", NAME)


@needs_core
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("command", REQUESTS, ids=lambda command: command.name)
def test_requests(command: Command, server: Server) -> None:
    assert any(word.startswith(URL) for word in command.words)
    parts = [[*command.words, "--fail-with-body", "--silent", "--max-time", "120"], *command.pipe]
    line = "set -o pipefail; " + " | ".join(shlex.join(part) for part in parts)
    done = subprocess.run(
        ["bash", "-c", adapted(line, server)],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()  # grep has found something, the server said something
    if not command.pipe:
        assert json.loads(done.stdout)["choices"]


@needs_core
@pytest.mark.parametrize("block", code("python"), ids=lambda block: block.name)
def test_python(block: Block, workplace: Path, request: pytest.FixtureRequest) -> None:
    q, k, v = torch.randn(100, 4, 64), torch.randn(300, 2, 64), torch.randn(300, 2, 64)
    names = {
        **{"q": q, "k": k, "v": v, "policies": None},
        "kv_cache": torch.randn(3, 2, 128, 128),
        "block_table": torch.tensor([[0, 1, 2]], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 100], dtype=torch.int32),
        "seq_lens": torch.tensor([300], dtype=torch.int32),
    }
    if "OpenAI" not in block.text:
        exec(compile(block.text, block.name, "exec"), names)
        return
    server: Server = request.getfixturevalue("server")
    before = server.metrics()
    exec(compile(adapted(block.text, server), block.name, "exec"), names)
    if "document.txt" in block.text:
        off = '"off"' in block.text
        ran = {"path": "dense", "reason": "request_off"} if off else {"path": "sparse"}
        after = server.metrics()
        assert counted(after, "layer_tokens", **ran) > counted(before, "layer_tokens", **ran)


# Data


@pytest.mark.parametrize("block", code("json"), ids=lambda block: block.name)
def test_json_is_a_profile(block: Block, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(block.text)
    load_profile(tmp_path / "profile.json")


@pytest.mark.parametrize("block", code("yaml"), ids=lambda block: block.name)
def test_yaml_is_a_workload(block: Block, tmp_path: Path) -> None:
    workload: Any = importlib.import_module("loadtest.ab.workload")
    (tmp_path / "mine.yaml").write_text(block.text)
    workload.load_workload(str(tmp_path / "mine.yaml"))
