"""Pictures of a calibration: error against density, and the attention it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_sparse_backend.calibrate.results import Measurement
from vllm_sparse_backend.report.svg import DENSE, INK, SPARSE, look
from vllm_sparse_backend.report.verdict import chosen_figures
from vllm_sparse_backend.target import is_gpu

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.6
KEEP_ALL = "#4a7fb5"
SELECTORS = {"sale": "#d9602b", "mass": "#3c8d53", "static": "#4a7fb5"}
# The rules whose budget is an error such as the curves', and of what it is.
BUDGET_OF = {
    "head": "each head",
    "global": "the mean of all heads",
    "loss": "the mean of all heads, which the model's loss has a part in",
}
OTHERS = ("#8a5fb0", "#a0792f", "#8a8f98")


def curves_figure(measurement: Measurement) -> Figure:
    """A panel for each length: what every threshold of each selector does to all heads, and
    where the profile is."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    chosen = chosen_figures(measurement)
    lengths = sorted({curve.length for curve in measurement.curves})
    selectors = list(dict.fromkeys(curve.selector for curve in measurement.curves))
    colours = _colours(selectors)
    with rc_context(look("curves")):
        columns = min(3, len(lengths))
        lines = -(-len(lengths) // columns)
        figure = Figure(figsize=(WIDTH, 0.5 + 2.5 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes, length in zip(panels, lengths, strict=False):
            for curve in measurement.curves:
                if curve.length == length:
                    axes.plot(
                        [point.figures.density for point in curve.points],
                        [point.figures.error for point in curve.points],
                        color=colours[curve.selector], linewidth=1.6, marker="o", markersize=3,
                        label=f"{curve.selector}, one threshold",
                    )  # fmt: skip
            if length in chosen:
                point = chosen[length]
                axes.plot(
                    point.density, point.error, "*", color=INK, markersize=12, label="the profile",
                    linestyle="none",
                )  # fmt: skip
            if measurement.rule in BUDGET_OF:
                axes.axhline(measurement.budget, color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
            axes.set_title(f"{length:,} tokens")
            axes.set_xlim(0, 1)
            axes.set_ylim(0, None)
            axes.grid(color=INK, alpha=0.12, linewidth=0.8)
        for at in range(0, len(panels), columns):
            panels[at].set_ylabel("relative L1 error")
        for axes in panels[max(0, len(lengths) - columns) : len(lengths)]:
            axes.set_xlabel("density")
        panels[0].legend(frameon=False, fontsize=8)
        for axes in panels[len(lengths) :]:
            axes.set_visible(False)
        return figure


def predicted_figure(measurement: Measurement) -> Figure:
    """Seconds for the attention of a whole prompt, by the cost model: of one thread, or of a GPU,
    where a band is between the ends of a range."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lengths = sorted(measurement.predicted)
    rows = [measurement.predicted[length] for length in lengths]
    with rc_context(look("predicted")):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for label, colour, values in (
            (measurement.base, DENSE, [row.base for row in rows]),
            ("every tile kept", KEEP_ALL, [row.keep_all for row in rows]),
            ("the profile", SPARSE, [row.sparse for row in rows]),
        ):
            axes.plot(lengths, values, color=colour, linewidth=2.2, marker="o", label=label)
        axes.set_xlim(0, 1.08 * max(lengths))
        axes.set_ylim(0, None)
        axes.set_xlabel("prompt tokens")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if is_gpu(measurement.isa):
            best = [row.sparse_best or row.sparse for row in rows]
            worst = [row.sparse for row in rows]
            axes.fill_between(lengths, best, worst, color=SPARSE, alpha=0.2, linewidth=0)
        of = "a GPU, never timed" if is_gpu(measurement.isa) else "one thread"
        axes.set_ylabel(f"seconds of attention, {of}")
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
        axes.legend(frameon=False, loc="upper left")
        return figure


def _colours(selectors: Sequence[str]) -> dict[str, str]:
    others = [name for name in selectors if name not in SELECTORS]
    return SELECTORS | {name: OTHERS[at % len(OTHERS)] for at, name in enumerate(others)}
