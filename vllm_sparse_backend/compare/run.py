"""Compares: reads the text through vLLM, measures every setting on every layer, adds up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Taken before an engine is started, which puts one that does nothing in its place.
from torch import get_num_threads, set_num_threads

from vllm_sparse_backend import __version__
from vllm_sparse_backend.calibrate.candidates import why_unusable
from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.run import Model
from vllm_sparse_backend.calibrate.sources import core_digest, digest, made_of
from vllm_sparse_backend.compare.capture import capture
from vllm_sparse_backend.compare.measure import Bench, How, Measured, judged_blocks
from vllm_sparse_backend.compare.methods import Chosen, Method, Setting
from vllm_sparse_backend.compare.results import MethodResult, Point
from vllm_sparse_backend.compare.rounds import spoiled, usual
from vllm_sparse_backend.compare.store import POINTS, Store
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import ListSelector

Advance = Callable[[str, float], None]  # what is being done, and how much of it is done now
NAME = 16  # hexadecimal digits in a setting's file name
AGAIN = 2  # times that what was disturbed is measured once more


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    options: EngineOptions
    model: Model
    layers: tuple[int, ...]
    documents: tuple[Document, ...]  # one of each length
    methods: tuple[Method, ...]
    how: How
    threads: int

    @property
    def lengths(self) -> list[int]:
        """Ascending."""
        return sorted(document.group.length for document in self.documents)

    @property
    def work(self) -> float:
        """What `Advance` comes to in all."""
        settings = sum(len(method.settings) for method in self.methods)
        each = len(self.layers) * settings + self._reading
        return each * sum(map(_weight, self.documents))

    @property
    def _reading(self) -> float:
        """Of a document, in units of one setting in one layer: about half of a layer's."""
        return self.model.facts.num_layers / 2


@dataclass(frozen=True)
class Job:
    """A setting in one layer at one length: its file and what that must be made of."""

    setting: Setting
    name: str
    key: str


@dataclass(frozen=True)
class Cell:
    """One layer of one document."""

    document: Document
    layer: int
    name: str  # of what was read
    key: str
    jobs: dict[str, list[Job]]  # by method


@dataclass(frozen=True)
class Found:
    """What was measured."""

    dense: str
    dense_seconds: dict[int, float]
    methods: list[MethodResult]
    disturbed: list[str]  # what something else had a part in, a line each


def rehearse_all(chosen: Chosen, facts: ModelFacts, layers: Sequence[int]) -> None:
    """Have every list selector choose once in every layer, before anything is read.

    Methods that cannot are left out. Raises Refused for one that was asked for by name or is a
    profile or a --policy, and what else selectors raise.
    """
    for method in list(chosen.methods):
        its = [it for setting in method.settings for it in setting.kinds()]
        listed = [policy for policy in its if isinstance(policy, ListSelector)]
        if (why := why_unusable(listed, facts, layers)) is not None:
            chosen.leave_out(method.name, why)


def compare(wanted: Wanted, store: Store, advance: Advance) -> Found:
    """Measure what the store does not have yet, the longest documents first: what fails for want of
    memory fails soon. Raises SparsePrefillError.
    """
    cells = [
        _cell(wanted, document, layer) for document in wanted.documents for layer in wanted.layers
    ]
    measured: dict[str, Measured] = {}
    for cell in cells:
        for job in _all(cell):
            if (known := store.load(POINTS, job.name, job.key, Measured)) is not None:
                measured[job.name] = known
        for name in spoiled(_of(cell, measured)):
            del measured[name]
        done = sum(job.name in measured for job in _all(cell))
        advance("", done * _weight(cell.document))
    missing = [cell for cell in cells if any(job.name not in measured for job in _all(cell))]
    _read(wanted, store, missing, advance)
    with _threads(wanted.threads):
        for cell in missing:
            for turn in range(1 + AGAIN):
                _measure(wanted, store, cell, measured, advance)
                off = spoiled(_of(cell, measured))
                if not off or turn == AGAIN:
                    break
                for name in off:
                    del measured[name]
                    advance("", -_weight(cell.document))
    return _added(wanted, cells, measured)


def _measure(
    wanted: Wanted, store: Store, cell: Cell, measured: dict[str, Measured], advance: Advance
) -> None:
    layer, ends = store.layer(cell.name, cell.key)
    bench = Bench(layer, cell.layer, ends, wanted.how)
    for method, jobs in cell.jobs.items():
        left = [job for job in jobs if job.name not in measured]
        if not left:
            continue
        advance(f"{cell.document.group.length:,} tokens, layer {cell.layer}: {method}", 0)
        for job, its in zip(left, bench.round([job.setting for job in left]), strict=True):
            store.save(POINTS, job.name, job.key, its)
            measured[job.name] = its
            advance("", _weight(cell.document))


def _of(cell: Cell, measured: dict[str, Measured]) -> dict[str, Measured]:
    return {job.name: measured[job.name] for job in _all(cell) if job.name in measured}


def _read(wanted: Wanted, store: Store, missing: Sequence[Cell], advance: Advance) -> None:
    """The layers of documents that have not been read, by one engine."""
    prompts = []
    chunks = 0
    for document in wanted.documents:
        names = {
            cell.layer: (cell.name, cell.key)
            for cell in missing
            if cell.document is document and not store.has_layer(cell.name, cell.key)
        }
        if names:
            prompts.append((document, names))
            chunks += len(names) * -(-len(document.token_ids) // wanted.options.chunk_tokens)
        else:
            advance("", wanted._reading * _weight(document))
    if not prompts:
        return
    each = wanted._reading * sum(_weight(document) for document, _ in prompts) / chunks
    advance("reading the text through vLLM", 0)
    capture(
        wanted.options,
        [(document.token_ids, names) for document, names in prompts],
        store,
        lambda: advance("", each),
    )


def _cell(wanted: Wanted, document: Document, layer: int) -> Cell:
    key = digest([__version__, wanted.options.identity(), document.token_ids, layer])
    heads = wanted.model.facts.num_heads
    judged = judged_blocks(wanted.how, len(document.token_ids))
    decides = [key, wanted.threads, core.active_isa(), vars(wanted.how), judged, core_digest()]

    def job(setting: Setting) -> Job:
        identity = setting.identity(layer, heads)
        sources = made_of(setting.rows(layer, heads))
        name = f"{document.name}-{layer}-{setting.kind}-{digest(identity)[:NAME]}"
        return Job(setting, name, digest([*decides, identity, sources]))

    jobs = {method.name: [job(its) for its in method.settings] for method in wanted.methods}
    return Cell(document, layer, f"{document.name}-{layer}", key, jobs)


def _all(cell: Cell) -> Iterator[Job]:
    for jobs in cell.jobs.values():
        yield from jobs


def _weight(document: Document) -> float:
    return float(document.group.length) ** 2


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = get_num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)


def _added(wanted: Wanted, cells: Sequence[Cell], measured: dict[str, Measured]) -> Found:
    dense_seconds = {
        length: sum(usual(_of(it, measured)) for it in cells if it.document.group.length == length)
        for length in wanted.lengths
    }
    results = []
    for method in wanted.methods:
        points = []
        for length in wanted.lengths:
            its = [cell.jobs[method.name] for cell in cells if cell.document.group.length == length]
            for at, setting in enumerate(method.settings):
                layers = [measured[jobs[at].name] for jobs in its]
                points.append(point_of(setting, length, layers, dense_seconds[length]))
        results.append(
            MethodResult(
                name=method.name,
                what=method.what,
                listed=method.listed,
                own=method.own,
                points=points,
            )
        )
    bases = {its.base for its in measured.values()}
    disturbed = [line for cell in cells for line in _disturbed(cell, measured)]
    return Found(", ".join(sorted(bases)), dense_seconds, results, disturbed)


def _disturbed(cell: Cell, measured: dict[str, Measured]) -> Iterator[str]:
    off = spoiled(_of(cell, measured))
    for method, jobs in cell.jobs.items():
        if its := [off[job.name] for job in jobs if job.name in off]:
            yield (
                f"{method}, {cell.document.group.length:,} tokens, layer {cell.layer}: dense "
                f"attention took {its[0]:.2f} of its usual time beside it"
            )


def point_of(
    setting: Setting, length: int, layers: Sequence[Measured], dense_seconds: float
) -> Point:
    """What a setting does to all measured layers: figures are their means, times their sums.

    ``dense_seconds``: of dense attention in all of them, which times in seconds are taken from.
    """
    dense = sum(statistics.median(its.dense) for its in layers)
    time = sum(statistics.median(its.seconds) for its in layers) / dense
    select = sum(statistics.median(its.select) for its in layers) / dense
    turns = [
        sum(seconds) / sum(beside)
        for seconds, beside in zip(
            zip(*(its.seconds for its in layers), strict=True),
            zip(*(its.dense for its in layers), strict=True),
            strict=True,
        )
    ]
    return Point(
        setting=setting.name,
        policy=setting.policy,
        length=length,
        error=statistics.fmean(its.error for its in layers),
        tail=statistics.fmean(its.tail for its in layers),
        recall=statistics.fmean(its.recall for its in layers),
        worst_recall=statistics.fmean(its.worst_recall for its in layers),
        density=sum(its.computed for its in layers) / sum(its.causal for its in layers),
        time=time,
        select=select,
        spread=(max(turns) - min(turns)) / statistics.median(turns),
        seconds=time * dense_seconds,
        select_seconds=select * dense_seconds,
    )
