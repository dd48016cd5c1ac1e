"""What chosen settings do to the model's predictions, every head of every layer under them.

An evaluation each (`evaluate`), over the tasks of likelihood; dense readings are made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend import __version__
from vllm_sparse_backend.calibrate.sources import core_digest, digest, made_of
from vllm_sparse_backend.compare.methods import KEEP_ALL, SALE_PAPER, Method, Setting
from vllm_sparse_backend.compare.results import MethodResult, Perplexity, Point
from vllm_sparse_backend.compare.run import NAME
from vllm_sparse_backend.compare.store import PERPLEXITY, Store
from vllm_sparse_backend.compare.verdict import nearest
from vllm_sparse_backend.demo.plan import Facts
from vllm_sparse_backend.evaluate.kept import DenseReadings
from vllm_sparse_backend.evaluate.plan import Plan, Wanted, make_plan
from vllm_sparse_backend.evaluate.results import Evaluation
from vllm_sparse_backend.evaluate.run import run
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, label
from vllm_sparse_backend.tasks.catalog import Task
from vllm_sparse_backend.tasks.stream import TokenStream

DENSE = "dense"  # folder of what dense attention read


class _Rows(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[Perplexity]


@dataclass(frozen=True)
class EndToEnd:
    """What was asked for."""

    model: Path
    facts: Facts
    streams: Sequence[TokenStream]
    tasks: tuple[Task, ...]
    length: int
    documents: int
    seed: int
    dtype: str
    chunk_tokens: int | None
    hf_overrides: dict[str, Any] | None
    repeat: str


def about(points: Sequence[Point], error: float, count: int) -> list[Point]:
    """Settings of a method about an error: the one that tables show, and then those nearest by the
    logarithms of their errors."""
    shown = nearest(points, error)

    def distance(point: Point) -> float:
        return -1.0 if point is shown else abs(math.log(max(point.error, 1e-12) / error))

    return sorted(points, key=distance)[:count]


def chosen(method: Method, result: MethodResult, length: int, error: float, count: int) -> set[str]:
    """The names of a method's settings that are evaluated: ``count`` of them, those that all else
    is compared with, and profiles. ``length``: where their errors are looked at."""
    if method.name == KEEP_ALL:
        return set()
    always = {label(UNIFORM_DEFAULT), label(SALE_PAPER)}
    names = {its.name for its in method.settings if its.policy is None or its.name in always}
    return names | {its.setting for its in about(result.of_length(length), error, count)}


def plan_of(wanted: EndToEnd, config: dict[str, Any]) -> Plan:
    """What is read under one configuration, the section sparse_prefill. Raises as `make_plan`."""
    return make_plan(
        wanted.model,
        wanted.facts,
        wanted.streams,
        Wanted(
            tasks=wanted.tasks,
            lengths=(wanted.length,),
            documents=wanted.documents,
            seed=wanted.seed,
            dtype=wanted.dtype,
            chunk_tokens=wanted.chunk_tokens,
            hf_overrides=wanted.hf_overrides,
            sparse_config=config,
        ),
    )


def evaluated(
    wanted: EndToEnd,
    methods: Sequence[Method],
    results: Sequence[MethodResult],
    *,
    longest: int,
    error: float,
    count: int,
    files: dict[str, Path],
    store: Store,
    note: Callable[[str], None],
) -> list[MethodResult]:
    """The results with the perplexities of the `chosen` settings; ``files``: of profiles, by their
    settings' names. What the store has is not evaluated again. Raises SparsePrefillError.
    """
    names = [chosen(*its, longest, error, count) for its in zip(methods, results, strict=True)]
    total, place = sum(map(len, names)), 0
    made = []
    for method, result, some in zip(methods, results, names, strict=True):
        found: list[Perplexity] = []
        for setting in method.settings:
            if setting.name in some:
                place += 1
                note(f"perplexity, {place} of {total}: {setting.name}")
                found += _evaluated(wanted, setting, files.get(setting.name), store)
        made.append(result.model_copy(update={"perplexities": found}))
    return made


def _evaluated(
    wanted: EndToEnd, setting: Setting, profile: Path | None, store: Store
) -> list[Perplexity]:
    if profile is None:
        assert setting.policy is not None
        config: dict[str, Any] = {"policy": setting.policy.model_dump(mode="json")}
        identity: Any = config
    else:
        config = {"profile": str(profile.resolve())}
        identity = setting.digest
    plan = plan_of(wanted, config)
    tokens = [item.token_ids for _, batch in plan.batches for item in batch.items]
    identities = [__version__, plan.options.identity(), identity, made_of(setting.kinds())]
    key = digest([*identities, core_digest(), tokens])
    name = f"{setting.kind}-{digest([wanted.length, identity])[:NAME]}"
    kept = store.load(PERPLEXITY, name, key, _Rows)
    if kept is None:
        readings = DenseReadings(store.folder / PERPLEXITY / DENSE, plan.options)
        kept = _Rows(rows=list(_rows(setting, run(plan, wanted.repeat, readings))))
        store.save(PERPLEXITY, name, key, kept)
    return kept.rows


def _rows(setting: Setting, evaluation: Evaluation) -> Iterator[Perplexity]:
    for row in evaluation.rows:
        if (found := row.likelihood) is not None:
            yield Perplexity(
                setting=setting.name,
                task=row.task,
                length=row.length,
                tokens=found.tokens,
                dense=found.dense_perplexity,
                sparse=found.sparse_perplexity,
                change_percent=found.change_percent,
                error_percent=found.error_percent,
                density=row.density,
            )
