"""Runs a load test: dense and sparse in turns, each repetition on a server of its own.

A fresh server has nothing in its caches, and only one runs at a time, so that neither takes the
other's cores. What is finished is kept in the folder and not run again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.demo.ask import Asker, Unexpected
from vllm_sparse_backend.demo.contention import cpu_time
from vllm_sparse_backend.demo.plan import Plan, make_plan, read_facts
from vllm_sparse_backend.demo.progress import console, note, warn_if_busy
from vllm_sparse_backend.demo.serve import Server, ServerOptions, Side
from vllm_sparse_backend.demo.text import build_document
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import load_profile

from .bench import Bench, Measured, read_measured
from .counters import LAYER_TOKENS, PREFIX_HITS, TILES, Counters, grown, read_counters, total
from .prompts import Dataset, Prompt, make_dataset
from .workload import Workload

SIDES: tuple[Side, Side] = ("dense", "sparse")
# Long enough that the sparse side warms up what it will be measured at; the short one decodes.
WARM_UP = (2304, 512)
ANY_PORT = 8000  # in the commands that are shown


@dataclass(frozen=True)
class LoadOptions(ServerOptions):
    """A server that takes more than one request at a time, and further arguments."""

    max_num_seqs: int = 64
    more: tuple[str, ...] = ()

    def arguments(self, side: Side, port: int) -> list[str]:
        """What follows `vllm` on the command line."""
        arguments = super().arguments(side, port)
        arguments[arguments.index("--max-num-seqs") + 1] = str(self.max_num_seqs)
        return [*arguments, *self.more]


@dataclass(frozen=True)
class Setup:
    """What a run is made of."""

    workload: Workload
    options: LoadOptions
    config: SparseConfig
    repeats: int
    dataset: Dataset
    profile: str = ""  # the digest of the one that was named

    @property
    def fingerprint(self) -> str:
        """Of all that a turn's figures depend on, but for the machine and the versions."""
        # The text is there as what was made of it; the rest is for judging.
        others = {"about", "bounds", "short_tokens", "slo", "text"}
        parts = [self.workload.model_dump_json(exclude=others)]
        parts += [self.options.shell(side, ANY_PORT) for side in SIDES]
        # With what the environment says, and what is in the profile's file.
        parts += [self.config.model_dump_json(), self.profile]
        parts += self.dataset.texts
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Turn(BaseModel):
    """One repetition of one side; the tool's own result lies beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    side: Side
    repetition: int  # from 1
    fingerprint: str
    made_at: datetime
    startup_seconds: float
    other_cores: float  # that neither the server nor the tool used, on average
    client_cores: float  # that the tool used
    counters: Counters  # how far they have grown
    info: dict[str, str]  # of the sparse backend; empty on the dense side
    server: str  # commands, to be typed
    bench: str


@dataclass(frozen=True)
class Done:
    """A finished turn and what was measured in it."""

    turn: Turn
    measured: Measured


def make_setup(
    workload: Workload,
    model: Path,
    *,
    packaged: bool,
    threads: int,
    repeats: int,
    dtype: str,
    sparse_config: dict[str, Any],
) -> Setup:
    """`packaged`: `model` is the one that a package carries, whose RoPE is scaled for workloads
    longer than it was trained for. Raises LengthRefused, ConfigError,
    ProfileError, TextError."""
    from transformers import AutoTokenizer

    served = workload.server
    plan: Plan = make_plan(
        model,
        read_facts(model, packaged),
        lengths=[served.max_model_len],
        threads=threads,
        chunk_tokens=served.chunk_tokens,
        sparse_config=sparse_config,
        quick=served.eager,
        dtype=dtype,
    )
    options = plan.setups[-1].options
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return Setup(
        workload=workload,
        options=LoadOptions(
            **{each.name: getattr(options, each.name) for each in fields(ServerOptions)},
            max_num_seqs=served.max_num_seqs,
            more=served.arguments,
        ),
        config=plan.config,
        repeats=repeats,
        dataset=make_dataset(workload, tokenizer),
        profile=load_profile(plan.config.profile).digest if plan.config.profile else "",
    )


def run(setup: Setup, folder: Path) -> list[Done]:
    """Every turn, in the order they were or would be run; those in `folder` are not run again.

    Raises Refused if `folder` is of another run, ServerFailed, and Unexpected if what ran was not
    what should have run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {(d.turn.side, d.turn.repetition): d for d in read_done(setup, folder)}
    dataset = setup.dataset.write(folder)
    (folder / "workload.json").write_text(setup.workload.model_dump_json(indent=2) + "\n")
    if kept:
        note(f"{len(kept)} of {len(SIDES) * setup.repeats} turns are in {folder} already")
    if len(kept) < len(SIDES) * setup.repeats:
        warn_if_busy()
    done = []
    for repetition in range(1, setup.repeats + 1):
        for side in SIDES:
            before = kept.get((side, repetition))
            done.append(before or _turn(setup, side, repetition, dataset, folder))
    return done


def read_done(setup: Setup, folder: Path) -> Iterator[Done]:
    """The finished turns in `folder`. Raises Refused if they are of another run."""
    for path in sorted(folder.glob("turns/*.turn.json")):
        try:
            turn = Turn.model_validate_json(path.read_bytes())
        except ValidationError:
            raise Refused(
                f"--output: {path} is no turn of this version; name another folder"
            ) from None
        if turn.fingerprint != setup.fingerprint:
            raise Refused(
                f"--output: {folder} holds turns of another workload, model or options; "
                "name another folder"
            )
        yield Done(turn, read_measured(_result(path), setup.dataset.prompts))


def _result(turn: Path) -> Path:
    """The tool's own file, of a turn's."""
    return turn.with_name(turn.name.replace(".turn.json", ".bench.json"))


def _turn(setup: Setup, side: Side, repetition: int, dataset: Path, folder: Path) -> Done:
    name = f"{repetition:02}-{side}"
    path = folder / "turns" / f"{name}.turn.json"
    result = _result(path)
    result.unlink(missing_ok=True)
    logs = folder / "logs"
    step = f"[{repetition}/{setup.repeats}] {side}"
    with Server(side, setup.options, logs / f"{name}.server.log") as server:
        asker = Asker(server)
        _warm_up(setup, asker, step)
        bench = Bench(setup.workload, dataset, result)
        before, began = read_counters(server.metrics()), cpu_time(server.session)
        client = bench.run(server, logs / f"{name}.bench.log", step)
        ended = cpu_time(server.session)
        wall = ended.wall - began.wall
        turn = Turn(
            side=side,
            repetition=repetition,
            fingerprint=setup.fingerprint,
            made_at=datetime.now(UTC).replace(microsecond=0),
            startup_seconds=server.startup_seconds,
            other_cores=max(0.0, ended.others_since(began) - client / wall),
            client_cores=client / wall,
            counters=grown(before, read_counters(server.metrics())),
            info=asker.info(),
            server=setup.options.shell(side, ANY_PORT),
            bench=_shown(bench, setup.options, side),
        )
    done = Done(turn, read_measured(result, setup.dataset.prompts))
    if wrong := what_is_wrong(turn, setup.dataset.prompts, setup.config):
        raise Unexpected(f"{step}: {wrong} (log: {server.log})")
    # Last, and at once: a turn that is there is finished.
    unfinished = path.with_suffix(".part")
    unfinished.write_text(turn.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    note(f"{step}: {done.measured.completed} requests in {done.measured.duration:.0f} s")
    return done


def _warm_up(setup: Setup, asker: Asker, step: str) -> None:
    """What a first request pays for, on text that shares no cache with the workload's."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(setup.options.model)
    started = time.perf_counter()
    for tokens in WARM_UP:
        length = min(tokens, setup.options.max_model_len - 16)
        with console.status(f"{step}: warming up, {time.perf_counter() - started:.0f} s"):
            asker.ask(build_document(tokenizer, length, seed=0).token_ids, salt="warm-up")


def what_is_wrong(turn: Turn, prompts: tuple[Prompt, ...], config: SparseConfig) -> str | None:
    """Why a turn's figures would not be what they claim to be; None: they are."""
    sparse = total(turn.counters, LAYER_TOKENS, 'path="sparse"')
    if turn.side == "dense":
        counted = total(turn.counters, LAYER_TOKENS) + total(turn.counters, TILES)
        return f"the dense server counted {turn.counters}" if counted else None
    longest = max(prompt.prompt_tokens for prompt in prompts)
    expected = config.enabled and longest >= config.min_prompt_tokens
    if expected and not sparse:
        return (
            f"nothing was prefilled sparsely, says the server's /metrics, of prompts up to "
            f"{longest} tokens; `vllm-sparse doctor` may know why"
        )
    return None


def cached_tokens(turn: Turn) -> float:
    """Prompt tokens that came from the prefix cache."""
    return total(turn.counters, PREFIX_HITS)


def commands(setup: Setup, folder: Path) -> Iterator[str]:
    """What would be run for each side, as lines to type; writes the dataset they read."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = setup.dataset.write(folder)
    for side in SIDES:
        bench = Bench(setup.workload, dataset, folder / f"{side}.json")
        yield setup.options.shell(side, ANY_PORT)
        yield _shown(bench, setup.options, side)


def _shown(bench: Bench, options: ServerOptions, side: Side) -> str:
    return f"vllm {shlex.join(bench.arguments(options, side, ANY_PORT))}"
