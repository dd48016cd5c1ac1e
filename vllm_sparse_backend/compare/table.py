"""The comparison as rows: for the terminal, for Markdown, and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sparse_backend.compare.results import Comparison, MethodResult, Perplexity
from vllm_sparse_backend.compare.verdict import efficiency, frontier, nearest, reach

NOT_REACHED = "not reached"
DASH = "–"


def headings(found: Comparison) -> list[str]:
    """Of `rows`."""
    error, length = found.errors[0], found.lengths[-1]
    tasks = tasks_of(found)
    return [
        "method",
        f"setting, {length:,} tokens",
        "error",
        "worst 1%",
        "recall",
        "density",
        "choosing",
        "time",
        f"time to {error:g}",
        f"faster than dense from, at {error:g}",
        *(f"perplexity, {task}" for task in tasks),
        "settings on the frontier",
    ]


def rows(found: Comparison) -> list[list[str]]:
    """A method each, at the longest length: its cheapest setting within the first error, or the one
    with the least, and what the error would cost. Times over dense attention's."""
    error, length = found.errors[0], found.lengths[-1]
    best = frontier(found, length)
    made = []
    for method in found.methods:
        point = nearest(method.of_length(length), error)
        assert point is not None
        made.append(
            [
                method.name,
                f"{point.setting}, the default"
                if point.setting == found.default
                else point.setting,
                f"{point.error:.4f}",
                f"{point.tail:.3f}",
                f"{point.recall:.4f}",
                f"{point.density:.3f}",
                f"{point.select:.1%}",
                f"{point.time:.1%}",
                share(reach(found, method, length, error)),
                str(efficiency(found, method, error)),
                *(changes(method, point.setting, task) for task in tasks_of(found)),
                f"{len(best[method.name])} of {len(method.of_length(length))}"
                if method.name in best
                else "",
            ]
        )
    return made


def tasks_of(found: Comparison) -> list[str]:
    """Of the evaluations, in their order."""
    return list(dict.fromkeys(its.task for method in found.methods for its in method.perplexities))


def changes(method: MethodResult, setting: str, task: str) -> str:
    """A setting's change of the perplexity; a dash: it was not evaluated."""
    for its in method.perplexities:
        if (its.setting, its.task) == (setting, task):
            return change(its)
    return DASH


def change(its: Perplexity) -> str:
    """ "+0.20 ± 0.05%"."""
    error = "" if its.error_percent is None else f" ± {its.error_percent:.2f}"
    return f"{its.change_percent:+.2f}{error}%"


def share(time: float | None) -> str:
    """ "12.3%"."""
    return NOT_REACHED if time is None else f"{time:.1%}"


def markdown(found: Comparison) -> str:
    """`rows` as a table."""
    lines = [headings(found), ["---"] * len(headings(found)), *rows(found)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def said(found: Comparison) -> str:
    """What was measured, in one line."""
    layers = ", ".join(map(str, found.layers))
    return (
        f"{found.model}, layers {layers} of {found.facts.num_layers}, {found.dtype}, {found.isa}, "
        f"threads: {found.threads}; dense is {found.dense}, "
        + _seconds(found.lengths, found.dense_seconds)
    )


def _seconds(lengths: Sequence[int], seconds: dict[int, float]) -> str:
    return "; ".join(f"{seconds[length]:.3g} s at {length:,} tokens" for length in lengths)
