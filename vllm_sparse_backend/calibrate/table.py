"""Everything that was measured, as one table: what each candidate policy does to each head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_sparse_backend.calibrate.candidates import LADDERS, Ladder
from vllm_sparse_backend.calibrate.measure import BY_LADDER
from vllm_sparse_backend.selection import DENSE, AnyPolicy
from vllm_sparse_backend.target import Target

Floats = npt.NDArray[np.float64]
# The figures of a table, and what they are where everything is computed.
EXACT = {
    "density": 1.0, "error": 0.0, "tail": 0.0, "recall": 1.0, "absolute": 0.0, "square": 0.0,
    "selection": 0.0,
}  # fmt: skip


class Group(NamedTuple):
    """Documents that a budget holds for on their own: of one kind of text and one length."""

    kind: str
    length: int


@dataclass(frozen=True)
class Part:
    """What one document gave: `measure.Sums` of its layers, stacked; L layers of H heads.

    ``size`` [L, H, octaves], ``rows`` and ``causal`` [octaves]; by ladder [L, H, octaves, G]:
    ``error``, ``square``, ``worst``, ``worst_size``, ``mass``, ``kept``. By listed ladder [L, G],
    ``select``: seconds of choosing tiles for a layer's heads; ``keep_all`` [L]: those of the core
    with every tile kept, on the same ``steps``, where there are listed ladders.
    """

    group: Group
    octaves: Sequence[int]
    size: Floats
    rows: Floats
    causal: Floats
    error: Sequence[Floats]
    square: Sequence[Floats]
    worst: Sequence[Floats]
    worst_size: Sequence[Floats]
    mass: Sequence[Floats]
    kept: Sequence[Floats]
    select: Sequence[Floats] = ()
    keep_all: Floats | None = None
    steps: int = 0  # that were measured: not those that a server would compute densely


class Candidate(NamedTuple):
    """A policy, and where on which ladder it stands; dense stands on none."""

    policy: AnyPolicy
    ladder: int = -1
    setting: int = -1
    slope: float = 0.0


@dataclass(frozen=True)
class Table:
    """C candidates, the last of them dense, over K groups, L layers, H heads: [C, K, L, H] each."""

    ladders: Sequence[Ladder]
    candidates: list[Candidate]
    groups: list[Group]
    density: Floats
    error: Floats  # relative L1
    tail: Floats  # the same of the worst 1% of the rows
    recall: Floats
    absolute: Floats  # sum of |O~ - O| per row, as SALE's calibration has it
    square: Floats  # sum of (O~ - O)^2 per row
    # Of list selectors, measured: choosing tiles over keeping all. Of others 0, it is predicted.
    selection: Floats

    @property
    def lengths(self) -> list[int]:
        """Ascending."""
        return sorted({group.length for group in self.groups})

    def of_length(self, length: int) -> list[int]:
        """The groups of a length."""
        return [i for i, group in enumerate(self.groups) if group.length == length]


def all_candidates(ladders: Sequence[Ladder] = LADDERS) -> list[Candidate]:
    """Those of every ladder, with every slope that it has, and dense."""
    return [
        Candidate(ladder.at(i, slope), number, i, slope)
        for number, ladder in enumerate(ladders)
        for slope in ladder.slopes
        for i in range(len(ladder.settings))
    ] + [Candidate(DENSE)]


def tabulate(parts: Iterable[Part], ladders: Sequence[Ladder] = LADDERS) -> Table:
    """The table of all documents, measured with these ladders; those of one group are taken
    together."""
    by_group: dict[Group, list[Part]] = {}
    for part in parts:
        by_group.setdefault(part.group, []).append(part)
    groups = sorted(by_group)
    columns = [_columns(by_group[group], ladders) for group in groups]
    stacked = {name: np.stack([column[name] for column in columns], 1) for name in EXACT}
    return Table(ladders, all_candidates(ladders), groups, **stacked)


def _columns(parts: Sequence[Part], ladders: Sequence[Ladder]) -> dict[str, Floats]:
    """One group's figures, [C, L, H] each."""
    size = sum(part.size.sum(2) for part in parts)  # [L, H]
    rows, causal = (
        sum(x.sum() for x in each) for each in ([p.rows for p in parts], [p.causal for p in parts])
    )
    made: dict[str, list[Floats]] = {name: [] for name in EXACT}
    for number, ladder in enumerate(ladders):
        selection = np.zeros((*size.shape, len(ladder.settings)))
        if ladder.listed:
            at = number - len(LADDERS)  # list selectors' are behind the fused ones
            took = np.sum([part.select[at] for part in parts], 0)  # [L, G]
            selection += (took / np.sum([_keep_all(its) for its in parts], 0)[:, None])[:, None]
        for slope in ladder.slopes:
            error, square, worst, worst_size, mass, kept = (
                sum(
                    _moved(getattr(part, name)[number], part.octaves, ladder, slope)
                    for part in parts
                )
                for name in BY_LADDER
            )  # [L, H, G]
            made["density"].append(kept / causal)
            made["error"].append(error / np.maximum(size, 1e-30)[..., None])
            made["tail"].append(worst / np.maximum(worst_size, 1e-30))
            made["recall"].append(mass / rows)
            made["absolute"].append(error / rows)
            made["square"].append(square / rows)
            made["selection"].append(selection)
    return {
        name: np.concatenate(
            [np.moveaxis(np.concatenate(arrays, 2), 2, 0), np.full((1, *size.shape), EXACT[name])]
        )
        for name, arrays in made.items()
    }


def _keep_all(part: Part) -> Floats:
    assert part.keep_all is not None
    return part.keep_all


def _moved(sums: Floats, octaves: Sequence[int], ladder: Ladder, slope: float) -> Floats:
    """Summed over octaves [L, H, G], each at the setting that its context moves a threshold to."""
    settings = sums.shape[3]
    total = np.zeros((*sums.shape[:2], settings))
    for place, octave in enumerate(octaves):
        index = np.arange(settings) + ladder.moved(slope, octave)
        total += sums[:, :, place, index.clip(0, settings - 1)]
    return total


def relative_cost(
    table: Table, target: Target, head_dim: int, methods: Sequence[str] | None = None
) -> Floats:
    """Seconds of each candidate's head over those of keeping all, mean over the lengths; [C, L, H].
    Predicted by the ``target``'s costs from the mean density of a length's groups, but for what
    list selectors take, which was measured; of a GPU's, the mean of both ends. Infinite for the
    selectors that are not among ``methods``, where given.
    """
    total = np.zeros((table.density.shape[0], *table.density.shape[2:]))
    for length in table.lengths:
        groups = table.of_length(length)
        measured = table.density[:, groups].mean(1) + table.selection[:, groups].mean(1)
        extra = np.mean([_predicted(table, end, length, head_dim) for end in target.ends], 0)
        total += measured + extra[:, None, None]
    if methods is not None:
        left_out = [
            its.ladder >= 0 and table.ladders[its.ladder].selector not in methods
            for its in table.candidates
        ]
        total[left_out] = np.inf
    return total / len(table.lengths)


def _predicted(table: Table, target: Target, length: int, head_dim: int) -> Floats:
    """What choosing tiles takes, over keeping all, by candidate [C]; of list selectors 0."""
    keep_all = target.sparse_seconds(DENSE, length, length, 1, head_dim, 1.0)
    selection = [
        target.selection_seconds(ladder.settings[-1], length, length, 1, head_dim)
        for ladder in table.ladders
    ] + [0.0]  # of dense, whose ladder is -1
    return np.array([selection[its.ladder] for its in table.candidates]) / keep_all
