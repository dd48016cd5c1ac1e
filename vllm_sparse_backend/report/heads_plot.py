"""A profile as a picture: policies and densities, layers downwards and heads to the right."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend.report.heads import Inspection, Kind, groups
from vllm_sparse_backend.report.svg import INK, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.16  # inches of a head, at least
WIDTH = 9.5  # of both panels with their legends
SHOWN = 14  # policies in the legend; of more, each selector's first and last
DENSITY_MAP = "YlOrBr"
# Each selector has a hue; within one, the darker a policy's colour the more it computes.
HUES = {"dense": "Greys", "static": "Blues", "sale": "Oranges", "mass": "Greens"}
LISTED_HUES = ("Purples", "Reds", "BuGn", "PuRd", "YlGn", "RdPu")  # of list selectors, in turn
UNMEASURED = "#d4d6da"


def heads_figure(inspection: Inspection, name: str = "heads") -> Figure:
    """Both panels, or policies alone where no density is known. Draw it within `rc_context`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(look(name)):
        panels = 1 if inspection.density is None else 2
        layers = len(inspection.layers)
        height = max(2.2, 0.9 + CELL * layers)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw_policies(axes[0], inspection)
        if panels == 2:
            draw_density(axes[1], inspection)
        figure.suptitle(inspection.profile, fontsize=11)
        return figure


def draw_policies(axes: Axes, inspection: Inspection) -> None:
    """Which policy each head follows, by colour, with a legend beside it."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = _colours(inspection.kinds)
    picture = [[head.kind for head in layer.heads] for layer in inspection.layers]
    axes.imshow(
        picture, ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    entries = (
        [(f"{kind.label} ({kind.heads})", at) for at, kind in enumerate(inspection.kinds)]
        if len(inspection.kinds) <= SHOWN
        else _ends(inspection.kinds)
    )
    handles = [
        Patch(facecolor=colours[at], edgecolor=INK, linewidth=0.4, label=words)
        for words, at in entries
    ]
    axes.legend(
        handles=handles, title="policy (heads)", loc="upper left", bbox_to_anchor=(1.0, 1.02),
        frameon=False, fontsize=8, title_fontsize=8,
    )  # fmt: skip
    _edges(axes, inspection, "policy")


def draw_density(axes: Axes, inspection: Inspection) -> None:
    """What share of its tiles each head computes, by colour, with a scale beside it."""
    import numpy as np
    from matplotlib import colormaps

    colours = colormaps[DENSITY_MAP].with_extremes(bad=UNMEASURED)
    picture = np.array(
        [
            [np.nan if head.density is None else head.density for head in layer.heads]
            for layer in inspection.layers
        ]
    )
    image = axes.imshow(
        picture, colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )  # fmt: skip
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    _edges(axes, inspection, f"density at {inspection.length:,} tokens")


def _edges(axes: Axes, inspection: Inspection, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    heads, layers = len(inspection.layers[0].heads), len(inspection.layers)
    axes.set_xticks([at - 0.5 for at in range(1, heads)], minor=True)
    axes.set_yticks([at - 0.5 for at in range(1, layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _ends(kinds: list[Kind]) -> list[tuple[str, int]]:
    """Of each selector its first and last kind, for a legend that cannot have all of them."""
    entries, at = [], 0
    for group in groups(kinds):
        first = f"{group.selector} ({group.heads})"
        if group.parameter:
            first += f", {group.parameter} {group.least:g}"
        entries.append((first, at))
        if group.kinds > 1:
            entries.append((f"to {group.most:g}", at + group.kinds - 1))
        at += group.kinds
    return entries


def _colours(kinds: list[Kind]) -> list[Any]:
    from matplotlib import colormaps

    listed = sorted({kind.policy.selector for kind in kinds} - set(HUES))
    hues = HUES | dict(zip(listed, cycle(LISTED_HUES), strict=False))
    colours = []
    for kind in kinds:
        same = [other for other in kinds if other.policy.selector == kind.policy.selector]
        share = same.index(kind) / max(1, len(same) - 1)  # 0: the lowest threshold
        colours.append(colormaps[hues[kind.policy.selector]](0.85 - 0.6 * share))
    return colours
