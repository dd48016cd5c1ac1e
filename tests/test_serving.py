"""`vllm serve --attention-backend sparse_prefill` as a user runs it, and what stops it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _batch import engine_config
from _engine import environment
from _models import POSITIONS, token_ids

from vllm_sparse_backend.config import session_directory
from vllm_sparse_backend.errors import SparsePrefillError

pytestmark = needs_core

SECTION: dict[str, Any] = {
    "min_prompt_tokens": 512,
    "dense_core": False,  # or which prompts are CPU_ATTN's would depend on the machine
    # Keeps everything, or answers would depend on how the scheduler happens to cut the prompts.
    "policy": {"selector": "sale", "tau": 0.0},
}
PROMPTS = [token_ids(100 + i, length) for i, length in enumerate([1500, 40, 900, 511] * 4)]
START_SECONDS = 400


def _command(model: Path, section: dict[str, Any], *more: str) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--attention-backend", "sparse_prefill", "--enforce-eager", "--dtype", "float32"]
    return [*command, "--additional-config", json.dumps({"sparse_prefill": section}), *more]


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def complete(self, prompt: list[int]) -> list[int]:
        """The tokens that follow the prompt, greedily."""
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps({**body, "ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return tokens

    def start_and_abandon(self, prompt: list[int]) -> None:
        """Ask, and hang up before there can be an answer."""
        body = json.dumps({"prompt": prompt, "max_tokens": 64, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            self.wait_for("vllm:num_requests_running", 1)

    def metrics(self) -> dict[str, float]:
        """/metrics by name and labels of ours, by name alone of vLLM's, summed."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                key = name if "sparse_prefill" in name else name.split("{")[0]
                if 'finished_reason="abort"' in name:
                    key = "aborted"
                found[key] = found.get(key, 0.0) + float(value)
        return found

    def wait_for(self, name: str, at_least: float) -> None:
        end = time.monotonic() + 60
        while self.metrics().get(name, 0.0) < at_least:
            assert time.monotonic() < end, f"{name} stays below {at_least}"
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    log, port = folder / "log", _free_port()
    options = ["--port", str(port), "--host", "127.0.0.1", "--max-num-batched-tokens", "256"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            _command(tiny_llama, SECTION, *options, "--max-num-seqs", "16"),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(TMPDIR=str(folder)),
            start_new_session=True,
        )
    started = Server(process, port, log)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                started.get("/health")
                break
            except OSError:
                time.sleep(0.2)
        yield started
    finally:
        # All that it started, however the tests went.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_server_says_once_what_runs(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "sparse_prefill: " in line]
    assert len(lines) == 1
    for part in ("CPU_ATTN", "every head sale", "tau=0.0", "from 512 tokens"):
        assert part in lines[0]


def test_many_at_once_and_one_that_leaves(server: Server) -> None:
    alone = [server.complete(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        leaving = pool.submit(server.start_and_abandon, token_ids(1, POSITIONS - 100))
        together = list(pool.map(server.complete, PROMPTS))
        leaving.result()
    assert together == alone
    server.wait_for("aborted", 1)
    assert server.complete(PROMPTS[0]) == alone[0]


def test_the_counters_are_at_metrics(server: Server) -> None:
    before = server.metrics()
    server.complete(token_ids(5, 1000))
    after = server.metrics()

    def grown(name: str, labels: str) -> float:
        key = f"vllm:sparse_prefill_{name}_total{{{labels}}}"
        return after[key] - before[key]

    # Chunks of 256: with the second, 512 tokens of context are reached.
    assert grown("layer_tokens", 'path="sparse",reason=""') == 2 * (1000 - 256)
    assert grown("layer_tokens", 'path="dense",reason="short_context"') == 2 * 256
    assert grown("layer_tokens", 'path="dense",reason="decode"') == 2 * 7
    computed, causal = (grown("tiles", f'kind="{kind}"') for kind in ("computed", "causal"))
    assert computed == causal > 0
    assert grown("seconds", 'phase="attend"') > 0
    info = [name for name in after if name.startswith("vllm:sparse_prefill_info")]
    assert len(info) == 1
    assert 'profile="uniform"' in info[0]


@pytest.mark.parametrize("path", ["/sparse_prefill/", "/sparse_prefill/status"])
def test_there_is_no_live_page_unless_asked_for(server: Server, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get(path)  # VLLM_PLUGINS does not name it; see test_live_page.py
    assert "sparse_prefill" not in server.get("/openapi.json")


def test_the_end_is_a_summary(server: Server) -> None:  # the last: it ends the server
    folder = server.log.parent
    assert list(folder.glob("vllm-sparse-prefill-*"))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    summaries = [
        line for line in server.log.read_text().splitlines() if "layer tokens sparse" in line
    ]
    assert len(summaries) == 1
    for part in ("density 1.000", "thread seconds selecting", "decode", "short_context"):
        assert part in summaries[0]
    assert not list(folder.glob("vllm-sparse-prefill-*"))


# What stops the start

MODEL = {
    "architecture": "LlamaForCausalLM",
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}
FILE = {"format": "vllm-sparse-profile", "version": 1, "model": MODEL}
POLICY = {"selector": "sale"}

FILES: dict[str, tuple[str, str]] = {  # what is in the file, what the message says
    "another model": (
        json.dumps({**FILE, "model": {**MODEL, "num_layers": 30, "num_kv_heads": 3}}),
        "num_layers.*30.*2.*num_kv_heads.*3.*2",
    ),
    "wrong head": (json.dumps({**FILE, "policies": {"0": {"4": POLICY}}}), "heads 0 to 3"),
    "wrong layer": (json.dumps({**FILE, "policies": {"2": {"*": POLICY}}}), "layers 0 to 1"),
    "unknown field": (json.dumps({**FILE, "polices": {}}), "did you mean 'policies'"),
    "truncated": (json.dumps(FILE)[:-20], "not valid JSON"),
    "NaN": (
        json.dumps({**FILE, "defaults": {"selector": "sale", "tau": math.nan}}),
        "tau.*finite number",
    ),
    "empty": ("", "not valid JSON"),
    "not text": ("\udcff" * 10, "not UTF-8"),
    "too long": ("x" * (50 << 20), "at most 16777216 bytes, got 52428800"),
}

SECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"profile": "/nowhere/profile.json"}, "/nowhere/profile.json.*No such file"),
    "directory": ({"profile": "/"}, "want a regular file, got a directory"),
    "device": ({"profile": "/dev/zero"}, "want a regular file"),
    "unknown field": ({"min_promt_tokens": 5}, "did you mean 'min_prompt_tokens'"),
    "wrong type": ({"min_prompt_tokens": "many"}, "min_prompt_tokens.*integer"),
    "wrong tau": ({"policy": {"selector": "sale", "tau": 2}}, "tau"),
    "two sources": ({"profile": "p.json", "policy": POLICY}, "profile or policy, not both"),
    "unknown set": ({"cpu_isa": "avx9"}, "cpu_isa: want one of .*got 'avx9'"),
}


def _one_line(error: SparsePrefillError) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(("content", "says"), FILES.values(), ids=FILES.keys())
def test_a_profile_that_stops_the_start(
    tiny_llama: Path, write: Callable[[str, str | bytes], Path], content: str, says: str
) -> None:
    path = write("profile.json", content.encode(errors="surrogateescape"))
    with pytest.raises(SparsePrefillError, match=says) as caught:
        engine_config(tiny_llama, {"profile": str(path)})
    assert "profile" in _one_line(caught.value)


@pytest.mark.parametrize(("section", "says"), SECTIONS.values(), ids=SECTIONS.keys())
def test_a_configuration_that_stops_the_start(
    tiny_llama: Path, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(SparsePrefillError, match=says) as caught:
        engine_config(tiny_llama, section)
    _one_line(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("VLLM_SPARSE_PREFILL_MIN_PROMPT_TOKENS", "many", "MIN_PROMPT_TOKENS.*integer"),
        ("VLLM_SPARSE_PREFILL_PROFIL", "x", "PROFIL: .*did you mean .*PROFILE"),
        ("VLLM_SPARSE_PREFILL_CPU_ISA", "sse", "got 'sse'"),
    ],
)
def test_a_variable_that_stops_the_start(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SparsePrefillError, match=says) as caught:
        engine_config(tiny_llama)
    _one_line(caught.value)


def test_nothing_of_it_matters_to_another_backend(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SPARSE_PREFILL_PROFIL", "x")
    engine_config(tiny_llama, {"profile": "/nowhere"}, attention_backend="CPU_ATTN")


def test_a_good_profile_starts(tiny_llama: Path, write: Callable[[str, str | bytes], Path]) -> None:
    policies = {"1": {"*": {"selector": "dense"}, "3": {"selector": "static"}}}
    path = write("mine.json", json.dumps({**FILE, "policies": policies}))
    engine_config(tiny_llama, {"profile": str(path)})
    directory = session_directory()
    assert directory is not None
    assert directory.is_dir()


@pytest.mark.parametrize("profile", ["profile.json", "missing.json"])
def test_the_command_ends_with_one_message(
    tiny_llama: Path, write: Callable[[str, str | bytes], Path], profile: str
) -> None:
    path = write("profile.json", FILES["another model"][0]).with_name(profile)
    done = subprocess.run(
        _command(tiny_llama, {"profile": str(path)}),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(path) in errors[0] or "does not fit the model" in errors[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert "Starting to load model" not in done.stderr + done.stdout
