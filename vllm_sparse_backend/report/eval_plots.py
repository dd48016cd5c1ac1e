"""Pictures of an evaluation: needles by length and depth, perplexity by position, TTFT."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from vllm_sparse_backend.evaluate.results import PERPLEXITY_LOSS, Evaluation, Row
from vllm_sparse_backend.report.svg import DENSE, INK, SPARSE, look
from vllm_sparse_backend.report.verdict import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.6  # inches, of a page's column
RIGHT_MAP = "RdYlGn"
SOFTENED = (0.12, 0.88)  # of the colour map: its ends are too dark to write on


def needle_tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Tasks whose answers lie at several depths, in their order."""
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    deep = [row.task for row in rows if row.retrieval and len(row.retrieval.depths) > 1]
    return list(dict.fromkeys(deep))


def needles_figure(evaluations: Sequence[Evaluation], task: str) -> Figure:
    """Dense and sparse side by side: the share right, with counts, length by depth."""
    import numpy as np
    from matplotlib import colormaps, rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    asked: dict[tuple[int, float], int] = defaultdict(int)
    right: dict[str, dict[tuple[int, float], int]] = {
        "dense": defaultdict(int), "sparse": defaultdict(int),
    }  # fmt: skip
    for evaluation in evaluations:
        for length, cell in evaluation.grid(task):
            place = length, cell.depth
            asked[place] += cell.asked
            right["dense"][place] += cell.dense_right
            right["sparse"][place] += cell.sparse_right
    lengths = sorted({length for length, _ in asked})
    depths = sorted({depth for _, depth in asked})
    colours = ListedColormap(colormaps[RIGHT_MAP](np.linspace(*SOFTENED, 64)))
    with rc_context(look(f"needles-{task}")):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.34 * len(depths)), layout="constrained")
        for axes, (side, counts) in zip(
            figure.subplots(1, 2, sharey=True), right.items(), strict=True
        ):
            shares = np.full((len(depths), len(lengths)), np.nan)
            for (length, depth), number in asked.items():
                if number:
                    at = depths.index(depth), lengths.index(length)
                    shares[at] = counts[length, depth] / number
                    axes.text(
                        at[1], at[0], f"{counts[length, depth]}/{number}",
                        ha="center", va="center", fontsize=8, color="#1c1e21",
                    )  # fmt: skip
            axes.imshow(shares, colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_title(f"{side}: {sum(counts.values())} of {sum(asked.values())}")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_xlabel("prompt tokens")
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        figure.axes[0].set_ylabel("depth in the prompt")
        return figure


def perplexity_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, Row]]:
    """Those with a perplexity by position: of each evaluation, task and text the longest, each
    with its title."""
    found: dict[tuple[int, str, str], Row] = {}
    for number, evaluation in enumerate(evaluations, 1):
        for row in evaluation.rows:
            if row.likelihood and row.likelihood.buckets:
                before = found.get(place := (number, row.task, row.text))
                if before is None or row.length > before.length:
                    found[place] = row
    several = len(evaluations) > 1
    return [
        (f"{row.name} [{number}]" if several else row.name, row)
        for (number, _, _), row in found.items()
    ]


def perplexity_figure(rows: Sequence[tuple[str, Row]]) -> Figure:
    """For each row, under its title, the perplexity of the tokens around each position, dense and
    sparse, and beside it by how much they differ."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(look("perplexity")):
        figure = Figure(figsize=(WIDTH, 0.4 + 2.4 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), 2, squeeze=False)
        for (both, change), (title, row) in zip(panels, rows, strict=True):
            assert row.likelihood is not None
            buckets = row.likelihood.buckets
            middle = [(bucket.first + bucket.last) / 2 for bucket in buckets]
            dense = [bucket.dense_perplexity for bucket in buckets]
            sparse = [bucket.sparse_perplexity for bucket in buckets]
            for label, colour, style, values in (
                ("dense", DENSE, "-", dense),
                ("sparse", SPARSE, "--", sparse),
            ):
                both.plot(
                    middle, values, style, color=colour, linewidth=2, label=label,
                    marker="o", markersize=3.5,
                )  # fmt: skip
            risen = [100 * (b / a - 1) for a, b in zip(dense, sparse, strict=True)]
            change.plot(middle, risen, color=SPARSE, linewidth=2, marker="o", markersize=3.5)
            change.axhline(0, color=INK, linewidth=0.8)
            widest = max([PERPLEXITY_LOSS, *(abs(value) for value in risen if isfinite(value))])
            change.set_ylim(-1.15 * widest, 1.15 * widest)
            change.axhline(PERPLEXITY_LOSS, color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
            both.set_ylabel("perplexity")
            change.set_ylabel("change, %")
            both.set_title(title)
            for axes in (both, change):
                axes.set_xlim(0, row.length)
                _token_axis(axes, "position in the prompt (tokens)")
                axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
        panels[0][0].legend(frameon=False)
        return figure


def ttft_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Lines through the medians of each evaluation, a dot for each prompt."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(look("ttft")):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot()
        longest = 0
        for number, evaluation in enumerate(evaluations):
            known = times(evaluation)
            lengths = [found.length for found in known]
            longest = max([longest, *lengths])
            for label, colour, medians, dots in (
                ("dense", DENSE, [t.dense for t in known], [t.dense_all for t in known]),
                ("sparse", SPARSE, [t.sparse for t in known], [t.sparse_all for t in known]),
            ):
                axes.plot(
                    lengths, medians, color=colour, linewidth=2.2, label=None if number else label
                )
                for length, values in zip(lengths, dots, strict=True):
                    axes.plot([length] * len(values), values, "o", color=colour, markersize=4)
            for found in known:
                axes.annotate(
                    f"{found.ratio:.2f}×", (found.length, found.sparse), xytext=(6, -14),
                    textcoords="offset points", color=SPARSE, weight="bold",
                )  # fmt: skip
        axes.set_xlim(0, 1.1 * longest)
        axes.set_ylim(0, None)
        _token_axis(axes, "prompt tokens")
        axes.set_ylabel("seconds to the first token")
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
        axes.legend(frameon=False, loc="upper left")
        return figure


def _token_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter("{x:,.0f}")
