"""The report's pictures, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vllm_sparse_backend.demo.serve import Side
from vllm_sparse_backend.report.svg import DENSE, INK, SPARSE, inline, look

from .run import SIDES
from .statistics import Estimate
from .summary import Summary

COLOURS: dict[Side, str] = {"dense": DENSE, "sparse": SPARSE}
INCHES = (7.2, 3.6)
WIDE = 1024  # prompt tokens beyond which a request is drawn wide
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}


def pictures(summary: Summary) -> Iterator[tuple[str, str]]:
    """Those there is data for, by name."""
    yield "lengths", _drawn(_lengths, summary, "Time to first token against prompt length")
    yield "ratios", _drawn(_ratios, summary, "Sparse over dense, with 95% intervals")
    if summary.wait is not None:
        yield "waits", _drawn(_waits, summary, "How many short requests wait how long")
    yield "turn", _drawn(_turn, summary, "Requests of the first repetition over time")


def _drawn(draw: Any, summary: Summary, title: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name = draw.__name__
    with rc_context({**look(name), "font.size": 11}):
        figure = Figure(figsize=INCHES, layout="constrained")
        draw(figure, summary)
    return inline(figure, name, title)


def _lengths(figure: Any, summary: Summary) -> None:
    axes = figure.add_subplot()
    for side in SIDES:
        points = [
            (sample.prompt_tokens, seconds)
            for sample in summary.samples
            for seconds in sample.times[side].ttft
            if seconds is not None
        ]
        axes.plot(*zip(*points, strict=True), ".", color=COLOURS[side], alpha=0.45, markersize=5)
        rows = [(row.tokens, getattr(row, side)) for row in summary.lengths]
        axes.plot(*zip(*rows, strict=True), "-o", color=COLOURS[side], label=side, linewidth=2)
    if summary.crossover:
        axes.axvline(summary.crossover, color=INK, linewidth=0.8, linestyle=":")
    _log(axes.yaxis, axes.set_yscale)
    axes.set_xscale("log", base=2)
    octaves = [round(math.log2(row.tokens)) for row in summary.lengths]
    ticks = [2**octave for octave in range(min(octaves), max(octaves) + 1)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("seconds to the first token")
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
    axes.legend(frameon=False, loc="upper left")


def _log(axis: Any, scale: Any) -> None:
    """A logarithmic axis with plain numbers: powers are set as formulas, which ours do without."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ratios(figure: Any, summary: Summary) -> None:
    rows: list[tuple[str, Estimate]] = [
        (f"{latency.requests}: {NAMES[latency.metric]}, p{percentile.percent}", percentile.ratio)
        for latency in summary.latencies
        for percentile in latency.percentiles
        if percentile.ratio is not None and percentile.percent in (50, 99)
    ]
    figure.set_size_inches(INCHES[0], 0.8 + 0.28 * len(rows))
    axes = figure.add_subplot()
    for place, (_, ratio) in enumerate(rows):
        axes.plot([ratio.low, ratio.high], [place, place], color=SPARSE, linewidth=2)
        axes.plot(ratio.value, place, "o", color=SPARSE, markersize=5)
    axes.axvline(1, color=INK, linewidth=0.8)
    _log(axes.xaxis, axes.set_xscale)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("sparse / dense; left of 1 sparse is faster")
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)


def _waits(figure: Any, summary: Summary) -> None:
    assert summary.wait is not None
    axes = figure.add_subplot()
    for side in SIDES:
        waits = sorted(
            seconds
            for sample in summary.samples
            if sample.prompt_tokens <= summary.wait.short_tokens
            for seconds in sample.times[side].ttft
            if seconds is not None
        )
        shares = [100 * (place + 1) / len(waits) for place in range(len(waits))]
        axes.step(waits, shares, where="post", color=COLOURS[side], label=side, linewidth=2)
    axes.set_xlabel("seconds to the first token")
    axes.set_ylabel("short requests, %")
    axes.set_ylim(0, 102)
    axes.set_xlim(0, None)
    axes.grid(color=INK, alpha=0.15, linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")


def _turn(figure: Any, summary: Summary) -> None:
    figure.set_size_inches(INCHES[0], 4.6)
    both = figure.subplots(2, 1, sharex=True)
    for side, axes in zip(SIDES, both, strict=True):
        for place, sample in enumerate(summary.samples):
            times = sample.times[side]
            sent, first, end = times.sent[0], times.ttft[0], times.e2e[0]
            if first is None or end is None:
                continue
            wide = 2.4 if sample.prompt_tokens > WIDE else 1.0
            axes.plot([sent, sent + first], [place] * 2, color=COLOURS[side], linewidth=wide)
            axes.plot(
                [sent + first, sent + end], [place] * 2, color=INK, alpha=0.35, linewidth=wide
            )
        axes.set_ylabel(f"request\n({side})")
        axes.invert_yaxis()
    both[-1].set_xlabel(f"seconds; coloured until the first token, wide: more than {WIDE} tokens")
