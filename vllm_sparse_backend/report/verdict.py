"""What a report says first: a few figures, and in plain words whether anything was lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from vllm_sparse_backend.calibrate.results import Figures, Measurement
from vllm_sparse_backend.evaluate.results import PERPLEXITY_LOSS, Evaluation, Row


@dataclass(frozen=True)
class Figure:
    """One number, large, and what it is."""

    value: str
    what: str


@dataclass(frozen=True)
class Times:
    """Medians over all cold prompts of one length in one evaluation, in seconds."""

    length: int
    dense: float
    sparse: float
    dense_all: tuple[float, ...]
    sparse_all: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast sparse is."""
        return self.dense / self.sparse


def times(evaluation: Evaluation) -> list[Times]:
    """Times to the first token, by length ascending."""
    dense: dict[int, list[float]] = defaultdict(list)
    sparse: dict[int, list[float]] = defaultdict(list)
    for row in evaluation.rows:
        if row.dense_ttft and row.sparse_ttft:
            dense[row.length] += row.dense_ttft
            sparse[row.length] += row.sparse_ttft
    return [
        Times(n, median(dense[n]), median(sparse[n]), tuple(dense[n]), tuple(sparse[n]))
        for n in sorted(dense)
    ]


def verdict(measurement: Measurement | None, evaluations: Sequence[Evaluation]) -> str:
    """One or two sentences."""
    if not evaluations:
        if measurement is None:
            return "Neither measured nor evaluated: only the policies are known."
        return (
            f"Calibrated, not evaluated: errors of single heads are known (rule "
            f"{measurement.rule}, budget {measurement.budget:g}), what they do to answers is not."
        )
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    lost = sum(row.retrieval.lost for row in rows if row.retrieval)
    right = sum(row.retrieval.dense_right for row in rows if row.retrieval)
    changes = [row.likelihood.change_percent for row in rows if row.likelihood]
    risen = sum(not change <= PERPLEXITY_LOSS for change in changes)  # a NaN is a loss, too
    parts = []
    if lost or risen:
        if lost:
            parts.append(f"{lost} of {right} answers that dense attention had right")
        if risen:
            texts = _count(risen, "text")
            parts.append(f"perplexity on {texts} by more than {PERPLEXITY_LOSS:g}%")
        said = "Lost against dense: " + ", and ".join(parts) + "."
    else:
        if right:
            parts.append(f"all {right} answers that dense attention had right are kept")
        if changes:
            texts = _count(len(changes), "text")
            parts.append(f"perplexity on {texts} rises by no more than {PERPLEXITY_LOSS:g}%")
        if not parts:  # of continuations alone, say
            return "Evaluated, but by no task that can be lost: the tables have the figures."
        said = "Nothing lost against dense: " + ", ".join(parts) + "."
    return said + _speed(evaluations)


def _speed(evaluations: Sequence[Evaluation]) -> str:
    longest, said = max(
        ((known[-1], its.dense_times()) for its in evaluations if (known := times(its))),
        key=lambda found: found[0].length,
        default=(None, ""),
    )
    if longest is None:
        return ""
    return (
        f" At {longest.length:,} tokens the first token comes {longest.ratio:.2f} times as fast "
        f"({longest.dense:.1f} s dense, {longest.sparse:.1f} s sparse{said and f'; {said}'})."
    )


def headline(
    density: float | None,
    length: int | None,
    measurement: Measurement | None,
    evaluations: Sequence[Evaluation],
) -> list[Figure]:
    """What is known, most telling first."""
    figures = []
    for evaluation in evaluations:
        if known := times(evaluation):
            last, said = known[-1], evaluation.dense_times()
            what = f"TTFT, dense / sparse at {last.length:,} tokens{said and f'; {said}'}"
            figures.append(Figure(f"{last.ratio:.2f}×", what))
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    right = sum(row.retrieval.dense_right for row in rows if row.retrieval)
    if right:
        both = sum(row.retrieval.both for row in rows if row.retrieval)
        figures.append(Figure(f"{both} of {right}", "answers kept that dense had right"))
    worst = max((row for row in rows if row.likelihood), key=_change, default=None)
    if worst is not None:
        figures.append(Figure(f"{_change(worst):+.2f}%", f"perplexity at worst: {worst.name}"))
    if density is not None:
        figures.append(Figure(f"{density:.3f}", f"density at {length:,} tokens, as calibrated"))
    if measurement is not None and measurement.heads and length is not None:
        chosen = chosen_figures(measurement)
        if length in chosen:
            figures.append(
                Figure(f"{chosen[length].error:.3f}", "error of a sparse layer's heads (mean)")
            )
    return figures


def chosen_figures(measurement: Measurement) -> dict[int, Figures]:
    """The mean over the measured heads, under the policies that were chosen, by length."""
    found: dict[int, list[Figures]] = defaultdict(list)
    for head in measurement.heads:
        for length, figures in head.figures.items():
            found[length].append(figures)
    names = list(Figures.model_fields)
    return {
        length: Figures(**{name: sum(getattr(f, name) for f in all_) / len(all_) for name in names})
        for length, all_ in sorted(found.items())
    }


def _change(row: Row) -> float:
    return row.likelihood.change_percent if row.likelihood else 0.0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
