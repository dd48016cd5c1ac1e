"""The counters of one worker process, in a file that other processes may read at any time.

The file is a page-aligned JSON header (what each slot is, and what is served) followed by
float64 slots, integers up to 2**53 being exact. One aligned 8-byte store per addition: a reader
sees the old value or the new one. The file outlives a worker that is killed.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_sparse_backend.metrics.prometheus import Mirror

SUFFIX = ".counters"
HEADER_BYTES = 8192
SLOT_BYTES = 8

_SERIAL = itertools.count()  # a process may start several engines

Key = tuple[str, ...]  # the metric's name, then its label values

LAYER_TOKENS = "layer_tokens"
TILES = "tiles"
SECONDS = "seconds"
SPARSE: Key = (LAYER_TOKENS, "sparse", "")
KEPT: Key = (LAYER_TOKENS, "keep_all", "short_context")
COMPUTED: Key = (TILES, "computed")
CAUSAL: Key = (TILES, "causal")
SELECT: Key = (SECONDS, "select")
ATTEND: Key = (SECONDS, "attend")


def dense(reason: str) -> Key:
    """The slot of the tokens that were computed dense for this reason."""
    return (LAYER_TOKENS, "dense", reason)


class Counters:
    """One process's counters; only this process writes them."""

    def __init__(
        self,
        directory: Path,
        reasons: Collection[str],
        info: Mapping[str, str],
        mirror: Mirror | None = None,
    ) -> None:
        """Create the file in ``directory``. ``info``: the labels of the info metric."""
        keys = [SPARSE, KEPT, *map(dense, reasons), COMPUTED, CAUSAL, SELECT, ATTEND]
        header = json.dumps({"info": dict(info), "slots": keys}).encode()
        if len(header) > HEADER_BYTES:
            raise ValueError(f"header: want at most {HEADER_BYTES} bytes, got {len(header)}")
        self.path = directory / f"{os.getpid()}-{next(_SERIAL)}{SUFFIX}"
        scratch = self.path.with_suffix(".new")
        size = HEADER_BYTES + SLOT_BYTES * len(keys)
        scratch.write_bytes(header.ljust(HEADER_BYTES) + bytes(size - HEADER_BYTES))
        with scratch.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        scratch.rename(self.path)  # nobody reads half a header
        self._values = memoryview(self._map)[HEADER_BYTES:].cast("d")
        self._slots = {key: slot for slot, key in enumerate(keys)}
        self._mirror = mirror

    def add(self, key: Key, amount: float) -> None:
        """Add to one counter."""
        self._values[self._slots[key]] += amount
        if self._mirror is not None:
            self._mirror.add(key, amount)


@dataclass
class Totals:
    """The counters of all workers of a server, summed."""

    values: dict[Key, float] = field(default_factory=dict)
    infos: list[dict[str, str]] = field(default_factory=list)  # what differs between workers

    def of(self, metric: str) -> Iterator[tuple[Key, float]]:
        """Label values and value of each counter of a metric."""
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
            values = memoryview(content)[HEADER_BYTES:].cast("d")
            slots = list(zip(map(tuple, header["slots"]), values, strict=True))
            info = dict(header["info"])
        except (OSError, ValueError, TypeError, KeyError):
            continue
        for key, value in slots:
            totals.values[key] = totals.values.get(key, 0.0) + value
        if info not in totals.infos:
            totals.infos.append(info)
    return totals
