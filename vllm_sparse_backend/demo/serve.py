"""Start and stop `vllm serve`: a process group of its own, a log file, and no orphans."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from vllm_sparse_backend.demo.progress import console, note
from vllm_sparse_backend.errors import SparsePrefillError

Side = Literal["dense", "sparse"]
BACKENDS: dict[Side, str] = {"dense": "CPU_ATTN", "sparse": "sparse_prefill"}
START_SECONDS = 600.0  # a first import of vLLM from a cold disk takes minutes on a slow machine
STOP_SECONDS = 20.0
TAIL_LINES = 30


class ServerFailed(SparsePrefillError):
    """The server did not come up, or went away; the message ends with the tail of its log."""


@dataclass(frozen=True)
class ServerOptions:
    """What both sides share; they differ in `--attention-backend` and in nothing else.

    `sparse_config` goes to the sparse side only, as `--additional-config`: the base backend would
    not read it.
    """

    model: str
    served_name: str
    max_model_len: int
    threads: int
    chunk_tokens: int = 2048
    kv_gib: int = 4
    dtype: str = "bfloat16"
    eager: bool = False  # up in a third of the time, without torch.compile
    hf_overrides: dict[str, Any] | None = None
    sparse_config: dict[str, Any] = field(default_factory=dict)

    def arguments(self, side: Side, port: int) -> list[str]:
        """What follows `vllm` on the command line."""
        arguments = ["serve", self.model, "--served-model-name", self.served_name]
        arguments += ["--attention-backend", BACKENDS[side]]
        arguments += ["--host", "127.0.0.1", "--port", str(port)]
        arguments += ["--dtype", self.dtype, "--enable-prefix-caching"]
        arguments += ["--enforce-eager"] if self.eager else []
        arguments += ["--max-model-len", str(self.max_model_len)]
        arguments += ["--max-num-batched-tokens", str(self.chunk_tokens)]
        arguments += ["--max-num-seqs", "8", "--generation-config", "vllm"]
        arguments += ["--enable-prompt-tokens-details"]  # says what came from the prefix cache
        if self.hf_overrides:
            arguments += ["--hf-overrides", json.dumps(self.hf_overrides, separators=(",", ":"))]
        if side == "sparse" and self.sparse_config:
            config = json.dumps({"sparse_prefill": self.sparse_config}, separators=(",", ":"))
            arguments += ["--additional-config", config]
        return arguments

    def environment(self) -> dict[str, str]:
        """The variables set for the server on top of this process's own."""
        chosen = {
            # Unbound threads are safe beside other processes. (The engine polls its worker for
            # a second at a time: with a thread on every core, it takes from those.)
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            # Huge pages for torch's large tensors. On small ones a prefill takes a tenth longer,
            # and how much longer is another matter in every server.
            "THP_MEM_ALLOC_ENABLE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if Path(self.model).is_dir():
            chosen["HF_HUB_OFFLINE"] = "1"  # everything is in the folder; ask nobody
        return chosen

    def shell(self, side: Side, port: int) -> str:
        """The same as a line to type."""
        variables = " ".join(f"{k}={v}" for k, v in self.environment().items())
        return f"{variables} vllm {shlex.join(self.arguments(side, port))}"


class Server:
    """A running `vllm serve`, as a context manager: leaving it, however that happens, ends the
    server and everything the server started."""

    def __init__(
        self, side: Side, options: ServerOptions, log: Path, port: int | None = None
    ) -> None:
        self.side = side
        self.options = options
        self.log = log
        self.port = port if port is not None else free_port()
        self.startup_seconds = float("nan")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server listens, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def session(self) -> int:
        """The id of the session that holds all of the server's processes; 0: not running."""
        return self._process.pid if self._process is not None else 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:  # Ctrl-C while it loads must not leave it behind either
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        # -m rather than the `vllm` command: the same interpreter, whatever PATH says.
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        command += self.options.arguments(self.side, self.port)
        started = time.perf_counter()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # A session of its own, so that Ctrl-C reaches us alone and we end the server in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.options.environment()},
                start_new_session=True,
            )
        with console.status("") as status:
            while not self._healthy():
                seconds = time.perf_counter() - started
                status.update(f"starting the {self.side} server: {seconds:.0f} s (log: {self.log})")
                self.check()
                if seconds > START_SECONDS:
                    raise ServerFailed(self._failure(f"did not answer in {START_SECONDS:.0f} s"))
                time.sleep(0.25)
        self.startup_seconds = time.perf_counter() - started
        note(f"{self.side} server ({BACKENDS[self.side]}) up after {self.startup_seconds:.0f} s")

    def check(self) -> None:
        """Raises `ServerFailed` if the process has ended."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise ServerFailed(self._failure(f"ended with exit status {code}"))

    def metrics(self) -> str:
        """The text of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def wait(self) -> None:
        """Until the server ends by itself. Raises `ServerFailed` if it does."""
        if self._process is not None:
            self._process.wait()
            self.check()

    def stop(self) -> None:
        """End the server: politely, then its whole process group for good."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                note(f"the {self.side} server does not end by itself; killing it")
        # The engine is a process of its own and may outlive the one that was asked to end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _failure(self, what: str) -> str:
        tail = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        command = self.options.shell(self.side, self.port)
        return "\n".join(
            [f"the {self.side} server {what}", f"it was: {command}", f"log {self.log} ends:", *tail]
        )


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_free(port: int) -> bool:
    """Whether nobody listens on this TCP port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
