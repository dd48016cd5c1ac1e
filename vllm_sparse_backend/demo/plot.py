"""The report's picture: time to first token against prompt length, as inline SVG."""

from __future__ import annotations

from vllm_sparse_backend.demo.results import Results, SideRow
from vllm_sparse_backend.report.svg import DENSE, INK, SPARSE, inline, look

INCHES = (7.2, 3.8)


def ttft_svg(results: Results) -> str:
    """One `<svg>` element: a line per side through the medians, a dot for every measurement."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**look("ttft"), "font.size": 11}):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        lengths = [row.prompt_tokens for row in results.rows]
        for label, colour, sides in (
            ("dense", DENSE, [row.dense for row in results.rows]),
            ("sparse", SPARSE, [row.sparse for row in results.rows]),
        ):
            axes.plot(lengths, _medians(sides), color=colour, linewidth=2.2, label=label)
            for length, side in zip(lengths, sides, strict=True):
                seconds = [document.ttft_seconds for document in side.documents]
                axes.plot([length] * len(seconds), seconds, "o", color=colour, markersize=4.5)
        for row in results.rows:
            if row.sparse_expected:
                axes.annotate(
                    f"{row.speedup:.1f}×",
                    (row.prompt_tokens, row.sparse.ttft_seconds),
                    xytext=(8, -15),
                    textcoords="offset points",
                    color=SPARSE,
                    weight="bold",
                )
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel("seconds to the first token")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlim(0, max(lengths) * 1.1)
        axes.set_ylim(0, None)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
        axes.legend(frameon=False, loc="upper left")
    return inline(figure, "ttft", "Time to first token against prompt length, dense and sparse")


def _medians(sides: list[SideRow]) -> list[float]:
    return [side.ttft_seconds for side in sides]
