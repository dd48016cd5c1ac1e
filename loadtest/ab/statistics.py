"""Ratios of two sides that got the same requests, with paired bootstrap intervals; and where one
becomes faster than the other. numpy only; arrays are [repetitions, requests in order of sending].

Requests that follow each other wait in the same queue, so they are no independent draws: blocks of
them are resampled (the circular block bootstrap of Politis and Romano, 1992), with blocks of
n^(1/3) as Hall, Horowitz and Jing (1995) have it. A request keeps its partner on the other side; so
does a repetition, which is resampled, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Values: TypeAlias = NDArray[np.float64]
# Of [draws, pairs] of dense and of sparse: one number a draw.
Statistic: TypeAlias = Callable[[Values, Values], Values]

DRAWS = 2000
TOGETHER = 250  # draws at a time: bounds the memory
LEVEL = 0.95


class Estimate(BaseModel):
    """A number and its 95% interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


def ratio_of_percentiles(percent: float) -> Statistic:
    """A percentile of sparse over the same of dense."""

    def statistic(dense: Values, sparse: Values) -> Values:
        return _percentile(sparse, percent) / _percentile(dense, percent)

    return statistic


def median_ratio(dense: Values, sparse: Values) -> Values:
    """The median over pairs of sparse / dense."""
    return _percentile(sparse / dense, 50)


def _percentile(values: Values, percent: float) -> Values:
    # The one for NaN goes row by row, and is needed only where a request has failed.
    of = np.nanpercentile if np.isnan(values).any() else np.percentile
    found: Values = of(values, percent, axis=-1)
    return found


def paired_bootstrap(
    dense: Values, sparse: Values, statistic: Statistic, seed: int = 0, draws: int = DRAWS
) -> Estimate | None:
    """`statistic` of all pairs, with the 95% percentile interval of its bootstrap distribution.

    `dense`, `sparse`: [R, N]; a pair of which either is NaN (a request that failed) is left out.
    None if no pair is left. Raises ValueError if the shapes differ.
    """
    if dense.shape != sparse.shape or dense.ndim != 2:
        raise ValueError(f"want two arrays [R, N], got {dense.shape} and {sparse.shape}")
    kept = ~np.isnan(dense) & ~np.isnan(sparse)
    if not kept.any():
        return None
    dense, sparse = np.where(kept, dense, np.nan), np.where(kept, sparse, np.nan)
    rng = np.random.default_rng(seed)
    repetitions, requests = dense.shape
    block = max(1, round(requests ** (1 / 3)))
    found = []
    for first in range(0, draws, TOGETHER):
        many = min(TOGETHER, draws - first)
        rows = rng.integers(repetitions, size=(many, repetitions, 1))
        starts = rng.integers(requests, size=(many, 1, math.ceil(requests / block), 1))
        columns = ((starts + np.arange(block)) % requests).reshape(many, 1, -1)[..., :requests]
        drawn = [side[rows, columns].reshape(many, -1) for side in (dense, sparse)]
        some = ~np.isnan(drawn[0]).all(axis=-1)  # a draw of failed requests alone says nothing
        found.append(statistic(drawn[0][some], drawn[1][some]))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(found), [tail, 100 - tail])
    value = statistic(dense.reshape(1, -1), sparse.reshape(1, -1))[0]
    return Estimate(value=float(value), low=float(low), high=float(high))


def crossover(tokens: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The prompt length from which on sparse is faster: where the ratio, sparse / dense, last comes
    down to 1, on straight lines through the points over log(tokens).

    `tokens` ascend. None if sparse is not faster at the longest; 0 if it is at all lengths.
    """
    if not ratios or not ratios[-1] < 1:
        return None
    points = list(zip(map(math.log, tokens), ratios, strict=True))
    for (shorter, before), (longer, after) in reversed(list(pairwise(points))):
        if before >= 1:
            return math.exp(shorter + (longer - shorter) * (before - 1) / (before - after))
    return 0.0


def common_prefix(one: str, other: str) -> float:
    """How much of two texts is the same from their beginning on, as a share of the longer."""
    longest = max(len(one), len(other))
    pairs = zip(one, other, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return same / longest if longest else 1.0
