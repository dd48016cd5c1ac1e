"""The resident memory of a server's processes over time: sampled, judged, drawn."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARE = 0.2  # of the samples, at either end, whose medians are compared


@dataclass(frozen=True)
class Sample:
    """One look at all processes of a server."""

    seconds: float  # since the load began
    prompt_tokens: int  # read until then
    resident: dict[str, int]  # bytes by process: its name and id


def memory(session: int) -> dict[str, int]:
    """Resident bytes of every process of a session, by its name and id.

    Pages that processes share count once for each: they do not grow by themselves.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session:
                found[f"{process.name()} {process.pid}"] = process.memory_info().rss
    return found


def growth(samples: list[Sample]) -> tuple[float, dict[str, float]]:
    """How much of the memory at the first samples has come on top at the last: of all, and of each
    process that was there throughout. Medians of a fifth of the samples each."""
    count = max(1, round(SHARE * len(samples)))
    first, last = samples[:count], samples[-count:]
    whole = _grown(
        [sum(sample.resident.values()) for sample in first],
        [sum(sample.resident.values()) for sample in last],
    )
    times = Counter(name for sample in samples for name in sample.resident)
    by_process = {
        name: _grown([s.resident[name] for s in first], [s.resident[name] for s in last])
        for name, seen in times.items()
        if seen == len(samples)
    }
    return whole, by_process


def _grown(first: list[int], last: list[int]) -> float:
    before = statistics.median(first)
    return statistics.median(last) / before - 1 if before else 0.0


def plot(samples: list[Sample], warm: float, path: Path) -> None:
    """Memory by process over time, as an SVG; what is not judged is shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    minutes = [sample.seconds / 60 for sample in samples]
    axes.axvspan(0, warm / 60, color="0.92")
    for name in sorted({name for sample in samples for name in sample.resident}):
        resident = [sample.resident.get(name, 0) / 2**20 for sample in samples]
        axes.plot(minutes, resident, linewidth=1.4, label=name)
    axes.set_xlabel("minutes (shaded: warm-up)")
    axes.set_ylabel("resident memory, MiB")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
