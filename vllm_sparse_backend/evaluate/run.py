"""Runs the plan: sparse, then dense, the same prompts; one engine at a time, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.demo.progress import console, note
from vllm_sparse_backend.evaluate.judge import judge
from vllm_sparse_backend.evaluate.kept import DenseReadings
from vllm_sparse_backend.evaluate.plan import Plan
from vllm_sparse_backend.evaluate.readings import Reader, Reading
from vllm_sparse_backend.evaluate.results import Evaluation
from vllm_sparse_backend.evaluate.statistics import perplexity
from vllm_sparse_backend.offline import engine
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.tasks.catalog import Batch
from vllm_sparse_backend.tasks.items import Item

Advance = Callable[[str, int], None]  # what is being done, tokens of it that are done


@dataclass(frozen=True)
class Served:
    """What the sparse engine said it runs."""

    facts: ModelFacts
    labels: dict[str, str]
    policies: str
    threads: int


def run(plan: Plan, repeat: str, kept: DenseReadings) -> Evaluation:
    """Measure everything, but for what the dense side has read before. `repeat`: the command to
    show for it.

    Raises SparsePrefillError if the sparse backend cannot run as asked.
    """
    started = time.perf_counter()
    # Sparse first: a profile that does not fit the model stops the start, and should not do so
    # after the dense half of the time.
    with _progress(plan) as advance:
        with engine(plan.options, "sparse_prefill", plan.sparse_config) as llm:
            served = _served(llm)
            sparse = list(_readings(plan, llm, "sparse", advance))
        documents = [document for its in plan.batches for document in _named(*its)]
        earlier = [found for its in documents if (found := kept.load(*its)) is not None]
        known, timed = len(earlier), sum(found.ttft is not None for found in earlier)
        if known:
            note(
                f"dense: {known} of {len(documents)} documents were read for an earlier "
                f"evaluation{'; their times are of then' if timed else ''}"
            )
        if known == len(documents):
            dense = list(_readings(plan, None, "dense", advance, kept))
        else:
            with engine(plan.options, "dense") as llm:
                dense = list(_readings(plan, llm, "dense", advance, kept))
    rows = [
        judge(batch, length, its, ours)
        for (length, batch), its, ours in zip(plan.batches, dense, sparse, strict=True)
    ]
    return Evaluation(
        made_at=datetime.now(UTC).replace(microsecond=0),
        model=plan.name,
        facts=served.facts,
        dtype=plan.options.dtype,
        threads=served.threads,
        chunk_tokens=plan.options.chunk_tokens,
        hf_overrides=plan.options.hf_overrides,
        machine=this_machine(),
        isa=served.labels["isa"],
        profile=served.labels["profile"],
        profile_digest=served.labels["digest"],
        policies=served.policies,
        sparse_config=plan.config.model_dump(mode="json", exclude_defaults=True),
        texts=plan.texts,
        tasks=tuple(map(str, plan.wanted.tasks)),
        lengths=plan.lengths,
        seed=plan.wanted.seed,
        repeat=repeat,
        rows=tuple(rows),
        dense_kept=known,
        dense_times_kept=timed,
        seconds=time.perf_counter() - started,
    )


def _named(length: int, batch: Batch) -> Iterator[tuple[str, Item]]:
    """A batch's documents, each with a name that no other has."""
    for place, item in enumerate(batch.items):
        yield f"{batch.task}-{batch.text}-{length}-{place}", item


def _readings(
    plan: Plan, llm: Any, side: str, advance: Advance, kept: DenseReadings | None = None
) -> Iterator[list[Reading]]:
    """Of each batch, of each of its items: what is in `kept`, the others by `llm`."""
    reader = None
    for length, batch in plan.batches:
        what = f"{side}: {batch.task}, {length} tokens"
        readings = []
        for name, item in _named(length, batch):
            advance(what, 0)
            reading = kept.load(name, item) if kept else None
            if reading is None:
                reader = reader or _warmed_up(llm, item)
                reading = reader.read(item, name)
                if kept:
                    kept.save(name, item, reading)
            readings.append(reading)
            advance(what, length)
        note(f"{side}: {batch.task} ({batch.text}), {length} tokens: {_brief(batch, readings)}")
        yield readings


def _warmed_up(llm: Any, item: Item) -> Reader:
    reader = Reader(llm)
    reader.warm_up(item.token_ids)
    return reader


def _brief(batch: Batch, readings: Sequence[Reading]) -> str:
    """For whoever waits."""
    losses = list(chain.from_iterable(reading.losses for reading in readings))
    if losses:
        return f"perplexity {perplexity(losses):.3f}"
    answers = [
        question.right(answer)
        for item, reading in zip(batch.items, readings, strict=True)
        for question, answer in zip(item.questions, reading.answers, strict=True)
    ]
    return f"{sum(answers)} of {len(answers)} right"


@contextmanager
def _progress(plan: Plan) -> Iterator[Advance]:
    """A bar on stderr, in tokens: time grows faster than that with length, but not by much."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    total = 2 * sum(length * len(batch.items) for length, batch in plan.batches)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("starting", total=total)

        def advance(what: str, tokens: int) -> None:
            progress.update(task, description=what, advance=tokens)

        yield advance


def _served(llm: Any) -> Served:
    import torch

    from vllm_sparse_backend.backend import start

    vllm_config = llm.llm_engine.vllm_config
    setup = start.resolve(vllm_config)
    return Served(
        start.facts_of(vllm_config.model_config),
        setup.labels(),
        setup.policies(),
        torch.get_num_threads(),
    )
