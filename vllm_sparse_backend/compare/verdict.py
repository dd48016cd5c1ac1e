"""What the points say: what an error costs under each method, and where the default stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_sparse_backend.compare import methods
from vllm_sparse_backend.compare.frontier import (
    At,
    Efficiency,
    efficiency_length,
    time_to_reach,
    unbeaten,
)
from vllm_sparse_backend.compare.results import Comparison, MethodResult, Point
from vllm_sparse_backend.selection import label

SALE_SETTING = label(methods.SALE_PAPER)
# Of the frontier: where more is off, something is always faster, and nobody serves it.
LIMIT = 0.1


def ats(points: Sequence[Point]) -> list[At]:
    """For `frontier`."""
    return [At(*point.at) for point in points]


def frontier(found: Comparison, length: int) -> dict[str, list[Point]]:
    """Of each method that has any, the settings that no setting of any method beats, up to an error
    of `LIMIT`. Profiles are no settings: they choose per head."""
    by_method = {
        its.name: [point for point in its.of_length(length) if point.error <= LIMIT]
        for its in found.methods
        if not its.profile
    }
    kept = unbeaten({name: ats(points) for name, points in by_method.items()})
    return {
        name: [point for point in by_method[name] if At(*point.at) in points]
        for name, points in kept.items()
    }


def reach(found: Comparison, method: MethodResult, length: int, error: float) -> float | None:
    """A method's time for an error, over dense attention's; None: not reached."""
    return time_to_reach(ats(method.of_length(length)), error)


def efficiency(found: Comparison, method: MethodResult, error: float) -> Efficiency:
    """CAB's efficiency length at an error."""
    ratios = [(length, reach(found, method, length, error)) for length in found.lengths]
    return efficiency_length(ratios)


def nearest(points: Sequence[Point], error: float) -> Point | None:
    """The cheapest measured setting within an error, or else the one with the least error."""
    within = [point for point in points if point.error <= error]
    if within:
        return min(within, key=lambda point: point.time)
    return min(points, key=lambda point: point.error, default=None)


def others(found: Comparison) -> Iterator[MethodResult]:
    """Methods of others: neither this package's rules nor profiles, nor every tile kept."""
    for method in found.methods:
        if not (method.own or method.profile or method.name == methods.KEEP_ALL):
            yield method


@dataclass(frozen=True)
class Rival:
    """A method and what it takes."""

    name: str
    time: float


def best_other(found: Comparison, length: int, error: float) -> Rival | None:
    """The fastest method of others at an error; None: none reaches it."""
    known = [
        Rival(method.name, time)
        for method in others(found)
        if (time := reach(found, method, length, error)) is not None
    ]
    return min(known, key=lambda rival: rival.time, default=None)


@dataclass(frozen=True)
class SaleOwn:
    """At the error of SALE's own setting, at one length; times over dense attention's."""

    length: int
    error: float
    time: float
    ours: float | None  # the default's method at that error; None: not reached
    rival: Rival | None

    @property
    def over_sale(self) -> float | None:
        """Ours over SALE's."""
        return None if self.ours is None else self.ours / self.time

    @property
    def over_rival(self) -> float | None:
        """Ours over the best other's."""
        if self.ours is None or self.rival is None:
            return None
        return self.ours / self.rival.time


def sale_own(found: Comparison, length: int) -> SaleOwn | None:
    """None: it was not measured."""
    sale = found.point(SALE_SETTING, length)
    if sale is None:
        return None
    ours = reach(found, found.method(found.default_method), length, sale.error)
    rival = best_other(found, length, sale.error)
    return SaleOwn(length, sale.error, sale.time, ours, rival)


def beating(found: Comparison, length: int) -> list[tuple[str, Point]]:
    """Settings of other methods with no more error than the default in no more time, fastest
    first."""
    default = found.point(found.default, length)
    if default is None:
        return []
    its = At(*default.at)
    uniform = [method for method in found.methods if not method.profile]
    every = [(method.name, p) for method in uniform for p in method.of_length(length)]
    better = [(name, point) for name, point in every if At(*point.at).beats(its)]
    return sorted(better, key=lambda pair: pair[1].time)


def standing(found: Comparison, length: int) -> str:
    """Where the default stands at a length, in words."""
    default = found.point(found.default, length)
    if default is None:
        return f"The default ({found.default}) was not measured at {length:,} tokens."
    said = (
        f"At {length:,} tokens the default ({found.default}) has an error of {default.error:.4f} "
        f"in {default.time:.1%} of dense attention's time"
    )
    better = beating(found, length)
    if not better:
        return (
            f"{said}, and is on the frontier: no measured setting has less of either without "
            "more of the other."
        )
    name, point = better[0]
    noise = max(default.spread, point.spread)
    text = (
        f"{said}, and is not on the frontier: {point.setting} of {name} has {point.error:.4f} in "
        f"{point.time:.1%}, {point.time / default.time:.2f} of its time"
    )
    if len(better) > 1:
        text += f", as have {len(better) - 1} more"
    if point.time > default.time * (1 - noise):
        text += f"; repetitions of the two differ by {noise:.0%}, which is more than that"
    return text + "."


def summary(found: Comparison) -> list[str]:
    """The verdict, a sentence each, the longest length first."""
    lines = [standing(found, length) for length in reversed(found.lengths)]
    its = sale_own(found, found.lengths[-1])
    if its is None:
        return lines
    at = f"At SALE's own error, {its.error:.4f} at {its.length:,} tokens"
    if its.over_sale is None:
        return [*lines, f"{at}, the default's method has no setting."]
    text = f"{at}, the default's method takes {its.over_sale:.2f} of SALE's time"
    if its.rival is not None and its.over_rival is not None:
        text += f" and {its.over_rival:.2f} of that of the best other method, {its.rival.name}"
    return [*lines, text + "."]
