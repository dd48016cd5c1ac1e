"""`vllm serve` with the sparse backend as a user runs it, asked by the openai client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _engine import Answer, environment
from prometheus_client.parser import text_string_to_metric_families

from vllm_sparse_backend.demo.serve import free_port, is_free

START_SECONDS = 400
STOP_SECONDS = 60
NAME = "tiny"
OURS = "vllm:sparse_prefill_"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass
class Server:
    """A running server; its log and its TMPDIR are in ``folder``."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    @property
    def log(self) -> str:
        """All it has said so far."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def url(self) -> str:
        """Of its OpenAI API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> str:
        """What it answers to a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def ask(
        self, prompt: list[int], *, scored: bool = False, tokens: int = 16, salt: str = ""
    ) -> Answer:
        """The greedy continuation of a prompt; ``scored``: with the prompt's own logprobs;
        ``salt``: what is cached under another is not found."""
        from openai import OpenAI

        more: dict[str, Any] = {"prompt_logprobs": 0} if scored else {}
        more |= {"cache_salt": salt} if salt else {}
        with OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=240) as client:
            answer: Any = client.completions.create(
                model=NAME,
                prompt=prompt,
                max_tokens=tokens,
                temperature=0,
                logprobs=0,
                extra_body={"ignore_eos": True, "return_token_ids": True, **more},
            )
        choice = answer.choices[0]
        details = answer.usage.prompt_tokens_details
        return Answer(
            choice.token_ids,
            choice.logprobs.token_logprobs,
            [
                entry[str(token)]["logprob"]
                for token, entry in zip(
                    prompt[1:], (choice.prompt_logprobs or [])[1:], strict=False
                )
            ],
            (details.cached_tokens or 0) if details else 0,
        )

    def metrics(self) -> Samples:
        """All of /metrics, by name and labels."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
        }

    def sessions(self) -> list[Path]:
        """The directories in which the server's workers count."""
        return sorted(self.folder.glob("vllm-sparse-prefill-*"))

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, and wait for all its processes. Returns its exit status."""
        self.process.send_signal(how)
        status = self.process.wait(STOP_SECONDS)
        _wait_until_gone(self.process.pid)  # multiprocessing's resource tracker comes last
        return status


def in_session(session: int) -> list[psutil.Process]:
    """The processes of a session that still do something."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def counted(samples: Samples, metric: str, **labels: str) -> int:
    """The sum of one of our counters over all samples with these labels."""
    return sum(
        int(value)
        for (name, pairs), value in samples.items()
        if name == f"{OURS}{metric}_total" and labels.items() <= dict(pairs).items()
    )


def command(model: Path, section: dict[str, Any], *options: str) -> list[str]:
    """The server's command line, without a port."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--attention-backend", "sparse_prefill", "--enforce-eager", "--dtype", "float32"),
        *("--served-model-name", NAME, "--enable-prompt-tokens-details"),
        *("--additional-config", json.dumps({"sparse_prefill": section}), *options),
    ]


@contextlib.contextmanager
def serve(
    model: Path, section: dict[str, Any], folder: Path, *options: str, **variables: str
) -> Iterator[Server]:
    """A server that answers; nothing of it is left afterwards, however the test went."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as stream:
        process = subprocess.Popen(
            command(model, section, "--host", "127.0.0.1", "--port", str(port), *options),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(**{"TMPDIR": str(folder), **variables}),
            start_new_session=True,
        )
    server = Server(process, port, folder)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, server.log[-3000:]
            assert time.monotonic() < end, server.log[-3000:]
            with contextlib.suppress(OSError):
                server.get("/health")
                break
            time.sleep(0.2)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait_until_gone(process.pid)
        assert is_free(port)


def _wait_until_gone(session: int) -> None:
    end = time.monotonic() + STOP_SECONDS
    while left := in_session(session):
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.1)
