"""Compares: reads the text through vLLM, measures every setting on every layer, adds up."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

# Taken before an engine is started, which puts one that does nothing in its place.
from torch import get_num_threads, set_num_threads

from vllm_sparse_backend import __version__
from vllm_sparse_backend.calibrate.candidates import why_unusable
from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.run import Model
from vllm_sparse_backend.compare.capture import capture
from vllm_sparse_backend.compare.measure import Bench, How, Measured
from vllm_sparse_backend.compare.methods import Chosen, Method, Setting
from vllm_sparse_backend.compare.results import MethodResult, Point
from vllm_sparse_backend.compare.store import POINTS, Store, digest
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import AnyPolicy, ListSelector

Advance = Callable[[str, float], None]  # what is being done, and how much of it is done now
NAME = 16  # hexadecimal digits in a setting's file name


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
                advance("", _weight(cell.document))
    missing = [cell for cell in cells if any(job.name not in measured for job in _all(cell))]
    _read(wanted, store, missing, advance)
    with _threads(wanted.threads):
        for cell in missing:
            _measure(wanted, store, cell, measured, advance)
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
    decides = [key, wanted.threads, core.active_isa(), vars(wanted.how), core_digest()]

    def job(setting: Setting) -> Job:
        identity = setting.identity(layer, heads)
        sources = sorted({source_digest(type(its)) for its in setting.rows(layer, heads)})
        name = f"{document.name}-{layer}-{setting.kind}-{digest(identity)[:NAME]}"
        return Job(setting, name, digest([*decides, identity, sources]))

    jobs = {method.name: [job(its) for its in method.settings] for method in wanted.methods}
    return Cell(document, layer, f"{document.name}-{layer}", key, jobs)


def _all(cell: Cell) -> Iterator[Job]:
    for jobs in cell.jobs.values():
        yield from jobs


@cache
def core_digest() -> str:
    """Of the compiled core: another one is as fast as it is."""
    return sha256(core.library().read_bytes()).hexdigest()


@cache
def source_digest(selector: type[AnyPolicy]) -> str:
    """Of the module that a list selector is written in, and of those of its package that this takes
    something from; "" for what the core is compiled of."""
    if not issubclass(selector, ListSelector):
        return ""
    package = selector.__module__.partition(".")[0]
    names, seen = [selector.__module__], set[str]()
    while names:
        name = names.pop()
        if name not in seen:
            seen.add(name)
            taken = (getattr(its, "__module__", None) for its in vars(sys.modules[name]).values())
            names += [its for its in taken if its in sys.modules and _within(its, package)]
    files = [sys.modules[name].__file__ for name in sorted(seen)]
    return digest([sha256(Path(file).read_bytes()).hexdigest() for file in files if file])


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


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
    dense_seconds = {}
    for length in wanted.lengths:
        of_layers = [
            statistics.median(s for job in _all(cell) for s in measured[job.name].dense)
            for cell in cells
            if cell.document.group.length == length
        ]
        dense_seconds[length] = sum(of_layers)
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
    return Found(", ".join(sorted(bases)), dense_seconds, results)


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
