"""Confidence intervals, without scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

Z = 1.959964  # two-sided 95% of the normal distribution
# The same of Student's t, by degrees of freedom from 1; beyond them its expansion around Z.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def wilson(hits: int, asked: int) -> tuple[float, float] | None:
    """Wilson's 95% score interval of the share hits / asked; None if nothing was asked."""
    if not asked:
        return None
    share, z2 = hits / asked, Z * Z / asked
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked))
    # At the ends it is exact, which rounding would hide.
    return (
        0.0 if not hits else max(0.0, middle - half),
        1.0 if hits == asked else min(1.0, middle + half),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Standard error of the mean and the half width of its 95% interval; None of a single value."""
    if len(values) < 2:
        return None
    if not all(map(math.isfinite, values)):  # `stdev` refuses them with an error of its own
        return math.nan, math.nan
    error = stdev(values) / math.sqrt(len(values))
    return error, student(len(values) - 1) * error


def student(freedom: int) -> float:
    """Two-sided 95% quantile of Student's t."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + first / freedom + second / freedom**2


def perplexity(nats: Sequence[float]) -> float:
    """exp of the mean."""
    return exp(fmean(nats))


def exp(value: float) -> float:
    """e to the power of `value`; infinity where that is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
