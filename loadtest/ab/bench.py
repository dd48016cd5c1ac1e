"""`vllm bench serve`: its command line, a run of it, and what it writes."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_sparse_backend.demo.ask import Unexpected
from vllm_sparse_backend.demo.progress import console
from vllm_sparse_backend.demo.serve import Server, ServerOptions, Side
from vllm_sparse_backend.errors import describe

from .prompts import Prompt
from .workload import Workload

PERCENTILES = (50, 90, 95, 99)
LOG_TAIL = 4000  # bytes


class Measured(BaseModel):
    """What is used of the JSON that `--save-detailed` writes; lists have an entry a request, in the
    order of the dataset. Times are in seconds, those of the probe in milliseconds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    duration: float
    completed: int
    failed: int
    output_throughput: float
    total_token_throughput: float
    input_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    ttfts: tuple[float, ...]
    latencies: tuple[float, ...]
    start_times: tuple[float, ...]  # on a clock of its own
    generated_texts: tuple[str, ...]
    errors: tuple[str, ...]
    probe_completed: int = 0
    probe_median_e2el_ms: float | None = None
    probe_p99_e2el_ms: float | None = None
    probe_max_e2el_ms: float | None = None


@dataclass(frozen=True)
class Bench:
    """One run of the tool against a server that is up."""

    workload: Workload
    dataset: Path
    result: Path  # the file it writes

    def arguments(self, options: ServerOptions, side: Side, port: int) -> list[str]:
        """What follows `vllm` on the command line."""
        traffic = self.workload.traffic
        values: dict[str, object] = {
            "backend": "openai",
            "base-url": f"http://127.0.0.1:{port}",
            "model": options.model,
            "served-model-name": options.served_name,
            "dataset-name": "custom",
            "dataset-path": self.dataset,
            "custom-output-len": -1,  # as the dataset says
            "num-prompts": self.workload.count,
            "seed": self.workload.seed,  # of the arrivals
            "request-rate": traffic.request_rate,
            "burstiness": traffic.burstiness,
            "temperature": 0,
            "percentile-metrics": "ttft,tpot,itl,e2el",
            "metric-percentiles": ",".join(map(str, PERCENTILES)),
            "label": side,
            "result-dir": self.result.parent,
            "result-filename": self.result.name,
        }
        if traffic.max_concurrency is not None:
            values["max-concurrency"] = traffic.max_concurrency
        if traffic.probe_rate:
            values["probe-request-rate"] = traffic.probe_rate
        # --ignore-eos: both sides decode as many tokens, whatever they answer.
        flags = ["disable-shuffle", "skip-chat-template", "no-oversample", "ignore-eos"]
        flags += ["save-result", "save-detailed"]
        pairs = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        return ["bench", "serve", *pairs, *(f"--{flag}" for flag in flags)]

    def run(self, server: Server, log: Path, step: str) -> float:
        """Send everything and wait for the answers; CPU seconds that the tool itself used.

        Raises Unexpected if it fails, and ServerFailed if the server does.
        """
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        command += self.arguments(server.options, server.side, server.port)
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
        if Path(server.options.model).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        used, started = _children_seconds(), time.perf_counter()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output, console.status(step) as status:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it
            )
            try:
                while process.poll() is None:
                    seconds = time.perf_counter() - started
                    status.update(f"{step}: {_done(log, self.workload.count)}, {seconds:.0f} s")
                    server.check()
                    time.sleep(0.5)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if process.returncode or not self.result.is_file():
            tail = log.read_text(errors="replace")[-LOG_TAIL:]
            raise Unexpected(
                f"vllm bench serve ended with exit status {process.returncode}; log {log} ends:\n"
                f"{tail}"
            )
        return _children_seconds() - used


def read_measured(path: Path, prompts: Sequence[Prompt]) -> Measured:
    """The tool's result for `prompts`. Raises Unexpected if it is of other requests."""
    try:
        measured = Measured.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise Unexpected(f"{path}: not what vllm bench serve writes: {describe(error)}") from None
    if len(measured.input_lens) != len(prompts):
        raise Unexpected(f"{path}: want {len(prompts)} requests, got {len(measured.input_lens)}")
    # The lengths are the server's own count.
    for number, prompt in enumerate(prompts):
        if not measured.errors[number] and measured.input_lens[number] != prompt.prompt_tokens:
            raise Unexpected(
                f"{path}: request {number}: want {prompt.prompt_tokens} prompt tokens, "
                f"the server counted {measured.input_lens[number]}"
            )
    return measured


def needs() -> None:
    """Raises ModuleNotFoundError if the tool would not run here."""
    import pandas  # noqa: F401  # reads the dataset


def _done(log: Path, count: int) -> str:
    """From the tool's own progress bar: "12 of 100 requests"."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        found = re.findall(rf"(\d+)/{count}\b", file.read().decode(errors="replace"))
    return f"{found[-1]} of {count} requests" if found else "starting vllm bench serve"


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
