"""The report's picture: time to first token against prompt length, as inline SVG."""

from __future__ import annotations

import io
import re

from vllm_sparse_backend.demo.results import Results, SideRow

# Readable on white and on near-black; the page's own text colour takes the place of INK.
DENSE, SPARSE, INK = "#8a8f98", "#d9602b", "#123456"
INCHES = (7.2, 3.8)


def ttft_svg(results: Results) -> str:
    """One `<svg>` element: a line per side through the medians, a dot for every measurement."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": "ttft",  # the same ids every time
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(look):
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
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _medians(sides: list[SideRow]) -> list[float]:
    return [side.ttft_seconds for side in sides]


def _inline(svg: str) -> str:
    """Without the XML prologue and the metadata, which name sites; scaled by the page."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    title = "Time to first token against prompt length, dense and sparse"
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        rf'<svg role="img" aria-label="{title}" \1width="100%"',
        re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1),
        count=1,
    )
