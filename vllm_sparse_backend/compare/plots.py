"""Pictures of a comparison: error against time, and what choosing tiles costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend.compare.results import Comparison, MethodResult, Point
from vllm_sparse_backend.compare.verdict import SALE_SETTING, frontier, nearest
from vllm_sparse_backend.report.svg import INK, SPARSE, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6  # inches, of a page's column
LEAST = 1e-4  # of an error that is drawn: what keeps every tile has one of rounding alone
# Readable on white and on near-black; with as many marks, a hundred lines can be told apart.
COLOURS = (
    "#d9602b", "#4a7fb5", "#3c8d53", "#8a5fb0", "#a0792f", "#c2477f", "#2f9aa0", "#8a8f98",
    "#7d8f2a", "#b0503f", "#5c6bc0",
)  # fmt: skip
MARKS = "osD^vP<X>"


def frontier_figure(found: Comparison, length: int) -> Figure:
    """Every method's ladder at one length; what is on the frontier stands out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    best = frontier(found, length)
    with rc_context(look(f"frontier-{length}")):
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.add_subplot()
        for at, method in enumerate(found.methods):
            _ladder(axes, method, length, _style(at), method.name in best)
        _named(axes, found.point(found.default, length), "*", 17, "the default")
        _named(axes, found.point(SALE_SETTING, length), "D", 11, "SALE's own setting")
        for error in found.errors:
            axes.axhline(error, color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
        axes.axvline(1, color=INK, alpha=0.5, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
        axes.xaxis.set_minor_formatter(lambda x, _: _minor(x))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("time of attention, selection included, over dense attention's")
        axes.set_ylabel("relative L1 error")
        axes.grid(color=INK, alpha=0.12, linewidth=0.8)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return figure


def selection_figure(found: Comparison, length: int) -> Figure:
    """At the first error, what of a method's time is choosing tiles."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    error = found.errors[0]
    chosen = [
        (its.name, p) for its in found.methods if (p := nearest(its.of_length(length), error))
    ]
    chosen.sort(key=lambda pair: pair[1].time, reverse=True)
    with rc_context(look(f"selection-{length}")):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(chosen)), layout="constrained")
        axes = figure.add_subplot()
        names = [name for name, _ in chosen]
        select = [100 * point.select for _, point in chosen]
        attend = [100 * (point.time - point.select) for _, point in chosen]
        axes.barh(names, attend, color=COLOURS[1], label="attention")
        axes.barh(names, select, left=attend, color=SPARSE, label="choosing tiles")
        for at, (_, point) in enumerate(chosen):
            missed = "" if point.error <= error else ", not reached"
            axes.text(100 * point.time, at, f" {point.error:.3f}{missed}", va="center", fontsize=8)
        axes.axvline(100, color=INK, alpha=0.5, linewidth=0.8)
        axes.set_xlabel("% of dense attention's time")
        axes.margins(x=0.18)
        axes.set_xlim(0, None)
        axes.legend(frameon=False, fontsize=8)
        return figure


def _ladder(
    axes: Axes, method: MethodResult, length: int, style: dict[str, Any], best: bool
) -> None:
    points = method.of_length(length)
    axes.plot(
        [point.time for point in points],
        [max(LEAST, point.error) for point in points],
        label=f"{method.name} (frontier)" if best else method.name,
        linewidth=1.9 if best else 0.9,
        alpha=1.0 if best else 0.6,
        markersize=4.5 if best else 3.5,
        **style,
    )


def _named(axes: Axes, point: Point | None, mark: str, size: int, label: str) -> None:
    if point is not None:
        axes.plot(
            [point.time], [max(LEAST, point.error)], mark, color=INK, markersize=size,
            fillstyle="none", label=label, zorder=5,
        )  # fmt: skip


def _style(at: int) -> dict[str, Any]:
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKS[at % len(MARKS)]}


def _minor(x: float) -> str:
    """Only 2 and 5 of a decade."""
    digit = f"{x:e}"[0]
    return f"{100 * x:g}%" if digit in "25" else ""


def lengths_of(found: Comparison) -> Sequence[int]:
    """The longest first."""
    return found.lengths[::-1]
