"""Which settings are worth having, and what an error costs: pure functions of (error, time).

Times are in any unit, here shares of dense attention's. A method is its measured points; between
two of them time is taken to be linear in the logarithm of the error, and beyond them nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class At(NamedTuple):
    """A measured setting."""

    error: float
    time: float

    def beats(self, other: At) -> bool:
        """Whether it is no worse in either, and better in one."""
        return self.error <= other.error and self.time <= other.time and self != other


class Efficiency(NamedTuple):
    """From which length on a method is faster than dense.

    ``length``: where ``known``, interpolated; else the shortest measured if it is faster there
    already, the longest if it is not there yet; None: the error is not reached at any.
    """

    length: float | None
    known: bool = False
    faster: bool = False  # at the longest measured length

    def __str__(self) -> str:
        if self.length is None:
            return "not reached"
        if self.known:
            return f"{self.length:,.0f}"
        return f"{'≤' if self.faster else '>'} {self.length:,.0f}"


def envelope(points: Sequence[At]) -> list[At]:
    """Those that no other beats, by ascending error; their times descend. Of equal ones, one."""
    kept: list[At] = []
    for point in sorted(set(points)):
        if not kept or point.time < kept[-1].time:
            kept.append(point)
    return kept


def time_to_reach(points: Sequence[At], error: float) -> float | None:
    """The least time for no more than this error; None: it is not reached."""
    line = envelope(points)
    if not line or error < line[0].error:
        return None
    for one, other in pairwise(line):
        if one.error <= error < other.error:
            if one.error <= 0:  # its logarithm is nowhere
                return one.time
            share = math.log(error / one.error) / math.log(other.error / one.error)
            return one.time + share * (other.time - one.time)
    return line[-1].time


def unbeaten(methods: Mapping[str, Sequence[At]]) -> dict[str, list[At]]:
    """Of each method the points that no point of any method beats; methods without one are not
    in it."""
    every = [point for points in methods.values() for point in points]
    return {
        name: kept
        for name, points in methods.items()
        if (kept := [its for its in points if not any(other.beats(its) for other in every)])
    }


def efficiency_length(ratios: Sequence[tuple[int, float | None]]) -> Efficiency:
    """Where a method's time over dense's falls to 1 for good (CAB's efficiency length).

    ``ratios``: by ascending length; None where the error is not reached, which is no faster than
    dense. Between two lengths the logarithm of the ratio is taken to be linear in that of the
    length; next to one without a ratio the crossing is at the length that has one.
    """
    if all(ratio is None for _, ratio in ratios):
        return Efficiency(None)
    faster = [ratio is not None and ratio <= 1 for _, ratio in ratios]
    if not faster[-1]:
        return Efficiency(ratios[-1][0])
    if all(faster):
        return Efficiency(ratios[0][0], faster=True)
    last = max(at for at, its in enumerate(faster) if not its)
    (below, slow), (above, fast) = ratios[last : last + 2]
    assert fast is not None
    if slow is None:
        return Efficiency(above, known=True, faster=True)
    share = math.log(slow) / (math.log(slow) - math.log(fast))
    return Efficiency(below * (above / below) ** share, known=True, faster=True)
