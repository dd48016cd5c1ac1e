"""The profile of a choice, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm_sparse_backend.calibrate.results import (
    Curve,
    Figures,
    HeadResult,
    Measurement,
    Point,
    Predicted,
)
from vllm_sparse_backend.calibrate.rules import Choice, Rule, divergence
from vllm_sparse_backend.calibrate.table import Floats, Part, Table
from vllm_sparse_backend.profile import Calibration, Profile
from vllm_sparse_backend.selection import DENSE, AnyPolicy, ListSelector, label
from vllm_sparse_backend.target import Target, is_gpu

if TYPE_CHECKING:
    from vllm_sparse_backend.calibrate.run import Model, Wanted

DIGITS = 5  # of figures in files


def profile_of(
    wanted: Wanted,
    model: Model,
    table: Table,
    choice: Choice,
    choosing: dict[str, float],
) -> Profile:
    """Every calibrated head's policy; what was not calibrated is dense."""
    policies = {
        layer: {head: table.candidates[i].policy for head, i in enumerate(row)}
        for layer, row in zip(model.sparse_layers, choice.tolist(), strict=True)
    }
    figures: dict[str, float] = {}
    for length in table.lengths:
        mean = _figures(table, length, choice)
        seconds = predicted(model, table, length, choice, wanted.target)
        figures |= {f"{name}_{length}": value for name, value in mean.model_dump().items()}
        figures[f"attention_speedup_{length}"] = round(seconds.base / seconds.sparse, 2)
    measured = "".join(f"; {name}: {seconds:.3g} s" for name, seconds in choosing.items())
    calibration = Calibration(
        texts=list(wanted.texts),
        lengths=list(table.lengths),
        error_budget=min(wanted.budget, 1.0)
        if wanted.rule in (Rule.HEAD, Rule.GLOBAL, Rule.LOSS)
        else None,
        seed=wanted.seed,
        figures=figures,
        note=f"rule {wanted.rule}, budget {wanted.budget:g}; density: mean over heads and kinds of "
        "text; error, tail and recall: mean over heads, each in its worst kind; "
        f"attention_speedup: {_against(wanted.target)}"
        + (f"; choosing tiles, measured, of a step and layer{measured}" if choosing else ""),
    )
    return Profile.build(
        model.facts, policies, name=wanted.name, defaults=DENSE, calibration=calibration
    )


def summary_of(
    wanted: Wanted,
    model: Model,
    profile: Profile,
    table: Table,
    choice: Choice,
    seconds: float,
    choosing: dict[str, float],
    sensitivity: Floats | None = None,
) -> Measurement:
    """What is written beside the profile."""
    heads = [
        HeadResult(
            layer=layer,
            head=head,
            policy=table.candidates[choice[place, head]].policy,
            figures={
                length: _figures(table, length, choice, (place, head)) for length in table.lengths
            },
        )
        for place, layer in enumerate(model.sparse_layers)
        for head in range(choice.shape[1])
    ]
    return Measurement(
        name=profile.name,
        digest=profile.digest,
        model=model.facts,
        texts=list(wanted.texts),
        kinds=sorted({group.kind for group in table.groups}),
        lengths=table.lengths,
        chunk_tokens=wanted.options.chunk_tokens,
        rule=str(wanted.rule),
        budget=wanted.budget,
        seed=wanted.seed,
        isa=wanted.target.name,
        base=wanted.target.base,
        whose=wanted.target.whose,
        dtype=wanted.options.dtype,
        sparse_layers=list(model.sparse_layers),
        heads=heads,
        curves=list(_curves(table)),
        predicted={
            length: predicted(model, table, length, choice, wanted.target)
            for length in table.lengths
        },
        divergence={} if sensitivity is None else _divergence(table, choice, sensitivity),
        methods=list(wanted.methods),
        choosing=choosing,
        seconds=round(seconds, 1),
    )


def _divergence(table: Table, choice: Choice, sensitivity: Floats) -> dict[int, float]:
    """By length, of the kind of text where the sum over heads is largest."""
    nats = np.take_along_axis(divergence(table, sensitivity), choice[None, None], 0)[0].sum((1, 2))
    return {
        length: _rounded(max(nats[i] for i in table.of_length(length))) for length in table.lengths
    }


def choosing(parts: Sequence[Part], table: Table, choice: Choice) -> dict[str, float]:
    """Seconds that the list selectors of the choice took for a step of ``chunk_tokens`` tokens in a
    layer, all of its heads; the mean over layers and the documents' measured steps."""
    steps = sum(part.steps for part in parts)
    fused = sum(not ladder.listed for ladder in table.ladders)
    found = {}
    for its in (table.candidates[i] for i in sorted(set(choice.flat))):
        if isinstance(its.policy, ListSelector):
            took = sum(part.select[its.ladder - fused][:, its.setting].mean() for part in parts)
            found[label(its.policy)] = _rounded(took / steps)
    return found


def _against(target: Target) -> str:
    if is_gpu(target.name):
        return f"the worse end of what is predicted, against {target.base}, for {target.whose}"
    return f"predicted, against {target.base} with {target.name}"


def predicted(model: Model, table: Table, length: int, choice: Choice, target: Target) -> Predicted:
    """Of the calibrated layers, for a whole prompt."""
    dim = model.facts.head_dim
    groups = table.of_length(length)
    density = _chosen(table.density[:, groups].mean(1), choice)
    measured = _chosen(table.selection[:, groups].mean(1), choice).sum()
    policies = [table.candidates[i].policy for i in choice.flat]

    def sparse(end: Target) -> float:
        chosen = sum(
            end.sparse_seconds(policy, length, length, 1, dim, float(its))
            for policy, its in zip(policies, density.flat, strict=True)
        )
        return chosen + measured * end.sparse_seconds(DENSE, length, length, 1, dim, 1.0)

    def rounded(seconds: float) -> float:  # a GPU's are small
        return float(f"{seconds:.{DIGITS}g}") if is_gpu(target.name) else _rounded(seconds)

    *better, worse = target.ends
    return Predicted(
        base=rounded(target.base_seconds(length, length, len(policies), dim)),
        keep_all=rounded(worse.attend_seconds(length, length, len(policies), dim)),
        sparse=rounded(sparse(worse)),
        sparse_best=rounded(sparse(better[0])) if better else None,
    )


def _figures(
    table: Table, length: int, choice: Choice, at: tuple[int, int] | None = None
) -> Figures:
    """Of the chosen candidates at a length: of one (layer, head), or the mean over all."""
    groups = table.of_length(length)
    values = {
        "density": table.density[:, groups].mean(1),
        "error": table.error[:, groups].max(1),
        "tail": table.tail[:, groups].max(1),
        "recall": table.recall[:, groups].min(1),
    }
    chosen = {name: _chosen(its, choice) for name, its in values.items()}
    return Figures(
        **{name: _rounded(its.mean() if at is None else its[at]) for name, its in chosen.items()}
    )


def _curves(table: Table) -> Iterable[Curve]:
    """Every head under one threshold, for the selectors that have one."""
    for length in table.lengths:
        for number, ladder in enumerate(table.ladders):
            members = [
                i
                for i, its in enumerate(table.candidates)
                if its.ladder == number and its.slope == 0
            ]
            points = [
                Point(tau=_tau(table.candidates[i].policy), figures=_uniform(table, length, i))
                for i in members
                if hasattr(table.candidates[i].policy, "tau")
            ]
            if points:
                yield Curve(selector=ladder.name, length=length, points=points)


def _uniform(table: Table, length: int, candidate: int) -> Figures:
    return _figures(table, length, np.full(table.density.shape[2:], candidate))


def _tau(policy: AnyPolicy) -> float:
    return float(policy.tau)  # type: ignore[union-attr]


def _chosen(values: Floats, choice: Choice) -> Floats:
    """[C, L, H] to [L, H]."""
    return np.take_along_axis(values, choice[None], 0)[0]


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
