"""A profile on the terminal: a row for each layer, a cell for each head."""

from __future__ import annotations

import math
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_sparse_backend.report.heads import Inspection, Kind, Layer, groups, threshold
from vllm_sparse_backend.selection import AnyPolicy, ListSelector, Static, keeps_all

LETTERS = {"dense": "·", "static": "w", "sale": "s", "mass": "m"}  # w: a window
LISTED_LETTER = "l"  # of every list selector; the legend has their names
LISTED = 12  # policies in the legend; more are summed up by selector

# From little computed to everything: readable as a background on dark and on light terminals.
STOPS = ("#1b5e8c", "#3f8fb0", "#9cc5b0", "#ecd08a", "#dd8f4a", "#a8441f")


def print_heads(inspection: Inspection, console: Console) -> None:
    """The table, its legend, and where the densities are from."""
    model = inspection.model
    console.print(
        f"{inspection.profile}: {model.architecture}, layers: {model.num_layers}, "
        f"heads: {model.num_heads}",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    room = (console.width - len("layer  density")) // model.num_heads
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_row("layer", f"heads 0 to {model.num_heads - 1}", _density_heading(inspection))
    for layer in inspection.layers:
        density = "" if layer.density is None else f"{layer.density:.3f}"
        table.add_row(str(layer.layer), _cells(layer, inspection.kinds, room), density)
    console.print(table)
    for line in _legend(inspection, room):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_origin(inspection), markup=False, soft_wrap=True)


def _density_heading(inspection: Inspection) -> str:
    return "density" if inspection.density is not None else ""


def _origin(inspection: Inspection) -> str:
    if inspection.density is None:
        return f"Policies only, colours by threshold: {inspection.why_no_density}."
    return (
        f"Density {inspection.density:.3f} at {inspection.length:,} tokens, mean of all heads; "
        f"colours by density; from {inspection.measurement}."
    )


def _legend(inspection: Inspection, room: int) -> list[str]:
    """A line for each policy, or for each selector where there are many policies."""
    few = len(inspection.kinds) <= LISTED
    named = (
        [(kind.policy.selector, kind.label, kind.heads) for kind in inspection.kinds]
        if few
        else [(group.selector, group.label, group.heads) for group in groups(inspection.kinds)]
    )
    lines = [
        f"{LETTERS.get(selector, LISTED_LETTER)} {words}: {heads} head{'s' if heads != 1 else ''}"
        for selector, words, heads in named
    ]
    if room > 2 and inspection.density is not None:
        lines.append("Numbers: density in percent.")
    elif room > 2:
        lines.append("Numbers n: a threshold tau of about 10^-n, a window of about 2^n.")
    return lines


def _cells(layer: Layer, kinds: list[Kind], room: int) -> Text:
    line = Text()
    for head in layer.heads:
        policy = kinds[head.kind].policy
        share = head.density if head.density is not None else by_threshold(policy)
        background = colour(share)
        ink = "white" if _luminance(background) < 0.45 else "black"
        line.append(_cell(policy, head.density, room), style=f"{ink} on {background}")
    return line


def _cell(policy: AnyPolicy, density: float | None, room: int) -> str:
    """The selector's letter and, where there is room for it, a number; up to 4 characters."""
    letter = LETTERS.get(policy.selector, LISTED_LETTER)
    if room < 3:
        return f"{letter:^{max(room, 1)}}"
    number: float | None = None if density is None else min(99, round(100 * density))
    if keeps_all(policy) or (isinstance(policy, ListSelector) and density is None):
        number = None
    elif density is None:
        tau = threshold(policy)
        window = policy.local if isinstance(policy, Static) else 0
        number = round(-math.log10(tau)) if tau else round(math.log2(max(1, window)))
    return f"{letter + ('' if number is None else str(int(number))):<3}"[:3].ljust(min(room, 4))


def by_threshold(policy: AnyPolicy) -> float:
    """A stand-in for a density that nobody measured: 1 for all, less with a higher threshold."""
    tau = threshold(policy)
    if keeps_all(policy):
        return 1.0
    if isinstance(policy, ListSelector):  # whatever it keeps
        return 0.5
    if tau is None:  # a window
        return 0.0
    return min(0.9, max(0.1, -math.log10(tau) / 5))  # 0.9 at 3e-5, 0.1 from 0.3 on


def colour(share: float) -> str:
    """Between the neighbouring `STOPS`, as #rrggbb; `share` from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    at = min(int(place), len(STOPS) - 2)
    low, high = list(pairwise(_parts(stop) for stop in STOPS))[at]
    mixed = (round(a + (b - a) * (place - at)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _luminance(colour: str) -> float:
    red, green, blue = _parts(colour)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255
