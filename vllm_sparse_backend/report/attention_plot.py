"""A head's attention as one picture: mass by q block and tile, kept or skipped, and what is
missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE
from vllm_sparse_backend.report.attention import AttentionMap
from vllm_sparse_backend.report.svg import INK, look
from vllm_sparse_backend.selection import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
FAINTEST = DECADES[0]  # of a row's mass: what is less has the same colour
KEPT_MAP, SKIPPED_MAP = "Blues", "Reds"
MEAN, WORST = "#b3261e", "#e8a49d"


def attention_figure(found: AttentionMap) -> Figure:
    """Query tokens downwards, key tokens to the right; beside it each q block's missed mass."""
    from matplotlib import colormaps, rc_context
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure

    def part(name: str) -> LinearSegmentedColormap:
        # From a tint on: that a tile is kept shows where it has no mass, too.
        return LinearSegmentedColormap.from_list(name, colormaps[name](np.linspace(0.12, 1, 64)))

    mass, kept = found.mean_mass.clamp(min=FAINTEST).numpy(), found.kept.numpy()
    tiles = np.arange(mass.shape[1]) * SUBTILE
    last = np.minimum(np.arange(1, len(mass) + 1) * Q_BLOCK, found.tokens)
    causal = tiles < last[:, None]
    norm = LogNorm(FAINTEST, 1.0)
    summary = found.summary()
    with rc_context(look("attention")):
        figure = Figure(figsize=(9.5, 6.6), layout="constrained")
        grid = figure.add_gridspec(1, 2, width_ratios=(6, 1.3))
        axes = figure.add_subplot(grid[0])
        strip = figure.add_subplot(grid[1], sharey=axes)
        extent = (0, mass.shape[1] * SUBTILE, len(mass) * Q_BLOCK, 0)
        for name, these, title in (
            (SKIPPED_MAP, causal & ~kept, "skipped"),
            (KEPT_MAP, causal & kept, "kept"),
        ):
            image = axes.imshow(
                np.ma.masked_where(~these, mass), part(name), norm,
                extent=extent, aspect="auto", interpolation="nearest",
            )  # fmt: skip
            bar = figure.colorbar(
                image, ax=[axes, strip], location="bottom", fraction=0.035, pad=0.02, shrink=0.8
            )
            bar.set_ticks(DECADES, labels=[f"{100 * share:g}%" for share in DECADES], minor=False)
            bar.minorticks_off()
            bar.set_label(f"{title}: a row's attention mass in {SUBTILE} keys, mean of a q block")
            bar.outline.set_visible(False)
        axes.set_xlabel("key token")
        axes.set_ylabel("query token")
        axes.set_xlim(0, found.tokens)
        axes.set_ylim(found.tokens, 0)
        mean, worst = (np.array(part) for part in found.missed_by_block())
        edges = np.append(np.arange(len(mass)) * Q_BLOCK, found.tokens)
        for values, colour, name in ((worst, WORST, "worst row"), (mean, MEAN, "mean")):
            strip.stairs(
                100 * values, edges, orientation="horizontal", fill=True, color=colour, label=name
            )
        strip.set_xlim(0, max(1.0, 105 * float(worst.max())))
        strip.set_xlabel("mass missed, %")
        strip.tick_params(labelleft=False)
        strip.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)
        strip.legend(frameon=False, fontsize=8, loc="upper right")
        figure.suptitle(
            f"{found.profile}: layer {found.layer}, head {found.head}: {label(found.policy)}\n"
            f"{found.tokens:,} tokens of {found.text}: density {summary.density:.3f}, "
            f"{summary.missed_mean:.2%} of the mass missed, {summary.missed_worst:.1%} in the "
            f"worst row" + (f"\n{summary.caution()}" if summary.caution() else ""),
            fontsize=10,
        )
        return figure
