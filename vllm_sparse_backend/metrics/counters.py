"""The counters of one worker process, in a file that other processes may read at any time.

The file is a page-aligned JSON header (what each slot is, and what is served) followed by
float64 slots, integers up to 2**53 being exact: those with a name, then the tiles of each head,
[2, layers, heads] over the whole model. One aligned 8-byte store per addition: a reader sees the
old value or the new one. The file outlives a worker that is killed.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from vllm_sparse_backend.metrics.prometheus import Mirror

SUFFIX = ".counters"
HEADER_BYTES = 8192
SLOT_BYTES = 8

_SERIAL = itertools.count()  # a process may start several engines

Key = tuple[str, ...]  # the metric's name, then its label values

LAYER_TOKENS = "layer_tokens"
LAYER_DECISIONS = "layer_decisions"
TILES = "tiles"
LAYER_TILES = "layer_tiles"
SECONDS = "seconds"
KINDS = ("computed", "causal")  # of tiles, as the first axis of `Counters.add_tiles`
SPARSE: Key = (LAYER_TOKENS, "sparse", "")
KEPT: Key = (LAYER_TOKENS, "keep_all", "short_context")
COMPUTED: Key = (TILES, "computed")
CAUSAL: Key = (TILES, "causal")
SELECT: Key = (SECONDS, "select")
ATTEND: Key = (SECONDS, "attend")
DENSE_ESTIMATE: Key = ("dense_estimate_seconds",)

Integers: TypeAlias = npt.NDArray[np.integer[Any]]


def dense(reason: str) -> Key:
    """The slot of the tokens that were computed dense for this reason."""
    return (LAYER_TOKENS, "dense", reason)


def decisions(tokens: Key) -> Key:
    """The slot of the decisions that sent the tokens of another slot where they went."""
    return (LAYER_DECISIONS, *tokens[1:])


class Counters:
    """One process's counters; only this process writes them."""

    def __init__(
        self,
        directory: Path,
        reasons: Collection[str],
        info: Mapping[str, str],
        mirror: Mirror | None = None,
        *,
        shape: tuple[int, int] = (0, 0),
        expected: Mapping[str, float] | None = None,
    ) -> None:
        """Create the file in ``directory``.

        ``info``: the labels of the info metric; ``shape``: layers and query heads of the whole
        model; ``expected``: what the profile was calibrated to, density by tokens of context.
        """
        tokens = [SPARSE, KEPT, *map(dense, reasons)]
        keys = [*tokens, *map(decisions, tokens), COMPUTED, CAUSAL, SELECT, ATTEND, DENSE_ESTIMATE]
        served = {"info": dict(info), "expected": dict(expected or {})}
        header = json.dumps({**served, "slots": keys, "shape": shape}).encode()
        if len(header) > HEADER_BYTES:
            raise ValueError(f"header: want at most {HEADER_BYTES} bytes, got {len(header)}")
        self.path = directory / f"{os.getpid()}-{next(_SERIAL)}{SUFFIX}"
        scratch = self.path.with_suffix(".new")
        layers, self._heads = shape
        size = HEADER_BYTES + SLOT_BYTES * (len(keys) + len(KINDS) * layers * self._heads)
        with scratch.open("w+b") as file:
            file.write(header.ljust(HEADER_BYTES))
            file.truncate(size)  # heads of other ranks take no space
            self._map = mmap.mmap(file.fileno(), size)
        scratch.rename(self.path)  # nobody reads half a header
        self._values = memoryview(self._map)[HEADER_BYTES:].cast("d")
        self._slots = {key: slot for slot, key in enumerate(keys)}
        of_heads = np.frombuffer(self._map, np.float64, offset=HEADER_BYTES)[len(keys) :]
        self._tiles = of_heads.reshape(len(KINDS), layers * self._heads)
        self._mirror = mirror
        if mirror is not None:  # at 0 from the start on, as the file is: alerts ask for that
            of_layers = itertools.product([LAYER_TILES], map(str, range(layers)), KINDS)
            for key in (*keys, *of_layers):
                mirror.add(key, 0)

    def add(self, key: Key, amount: float) -> None:
        """Add to one counter."""
        self._values[self._slots[key]] += amount
        if self._mirror is not None:
            self._mirror.add(key, amount)

    def add_tiles(self, kind: int, cells: Integers, amounts: Integers) -> None:
        """Add to the tiles of heads, in units of 16 keys.

        ``kind``: index in `KINDS`; ``cells`` [n], each once: layer * heads + head, over the whole
        model; ``amounts`` [n].
        """
        self._tiles[kind, cells] += amounts
        if self._mirror is not None:
            layers = cells // self._heads
            for layer in np.unique(layers).tolist():
                key = (LAYER_TILES, str(layer), KINDS[kind])
                self._mirror.add(key, int(amounts[layers == layer].sum()))


@dataclass
class Totals:
    """The counters of all workers of a server, summed."""

    values: dict[Key, float] = field(default_factory=dict)
    infos: list[dict[str, str]] = field(default_factory=list)  # what differs between workers
    expected: dict[str, float] = field(default_factory=dict)  # density by tokens of context
    tiles: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((len(KINDS), 0, 0)))
    workers: int = 0  # that there were, those that are gone included
    unreadable: int = 0  # files

    def of(self, metric: str) -> Iterator[tuple[Key, float]]:
        """Label values and value of each counter of a metric."""
        if metric == LAYER_TILES:
            for kind, layers in zip(KINDS, self.tiles.sum(2).tolist(), strict=True):
                yield from (((str(layer), kind), value) for layer, value in enumerate(layers))
            return
        for (name, *labels), value in self.values.items():
            if name == metric:
                yield tuple(labels), value

    def summary(self) -> str:
        """One line about what ran."""
        tokens = {labels: int(value) for labels, value in self.of(LAYER_TOKENS) if value}
        everything = sum(tokens.values())
        if not everything:
            return "no tokens were computed"
        sparse = tokens.pop(("sparse", ""), 0)
        reasons = ", ".join(
            f"{reason if path == 'dense' else path} {share / everything:.1%}"
            for (path, reason), share in sorted(tokens.items(), key=lambda item: -item[1])
        )
        line = f"{sparse / everything:.1%} of {everything} layer tokens sparse"
        if causal := self.values.get(CAUSAL):
            density = self.values[COMPUTED] / causal
            select, attend = self.values[SELECT], self.values[ATTEND]
            line += f" (density {density:.3f}"
            if select or attend:  # nobody takes the time on a GPU
                line += f", {select:.1f} thread seconds selecting, {attend:.1f} attending"
            line += ")"
        return f"{line}; dense: {reasons}" if reasons else line


def read_totals(directory: Path) -> Totals:
    """Sum the files of all workers that there were. A file that cannot be read is left out."""
    totals = Totals()
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            content = path.read_bytes()
            header = json.loads(content[:HEADER_BYTES])
            slots = [tuple(key) for key in header["slots"]]
            layers, heads = map(int, header["shape"])
            values = np.frombuffer(content, np.float64, offset=HEADER_BYTES)
            named = list(zip(slots, values[: len(slots)].tolist(), strict=True))
            tiles = values[len(slots) :].reshape(len(KINDS), layers, heads)
            info, expected = dict(header["info"]), dict(header["expected"])
        except (OSError, ValueError, TypeError, KeyError):
            totals.unreadable += 1
            continue
        for key, value in named:
            totals.values[key] = totals.values.get(key, 0.0) + value
        totals.tiles = _sum(totals.tiles, tiles)
        totals.expected.update(expected)
        totals.workers += 1
        if info not in totals.infos:
            totals.infos.append(info)
    return totals


def _sum(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of arrays that may differ in size: a process may have engines of several models."""
    if one.shape == other.shape:
        return one + other
    total = np.zeros(np.maximum(one.shape, other.shape))
    for part in (one, other):
        total[:, : part.shape[1], : part.shape[2]] += part
    return total
