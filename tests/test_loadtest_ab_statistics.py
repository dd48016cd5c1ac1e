"""loadtest/ab/statistics.py: paired, blocked, and right where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from _loadtest_ab import module
from hypothesis import given, settings
from hypothesis import strategies as st

S: Any = module("statistics")
SIDES = st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(0, 2**31))
DRAWS = 200


def seconds(shape: tuple[int, int, int]) -> Any:
    repetitions, requests, seed = shape
    return np.random.default_rng(seed).lognormal(size=(repetitions, requests))


@settings(deadline=None, max_examples=40)
@given(SIDES, st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([50, 99]))
def test_a_side_that_is_so_many_times_as_slow_has_that_ratio_without_doubt(
    shape: tuple[int, int, int], factor: float, percent: int
) -> None:
    # Pairs stay pairs: what both sides share is no uncertainty of the ratio.
    dense = seconds(shape)
    for statistic in (S.median_ratio, S.ratio_of_percentiles(percent)):
        found = S.paired_bootstrap(dense, factor * dense, statistic, draws=DRAWS)
        assert found.value == pytest.approx(factor)
        assert (found.low, found.high) == (pytest.approx(factor), pytest.approx(factor))


@settings(deadline=None, max_examples=40)
@given(SIDES)
def test_a_failed_request_takes_its_partner_with_it(shape: tuple[int, int, int]) -> None:
    dense, sparse = seconds(shape), 2 * seconds(shape)
    dense[0, 0] = math.nan
    sparse[-1, -1] = math.nan
    found = S.paired_bootstrap(dense, sparse, S.median_ratio, draws=DRAWS)
    if dense.size <= 2 and np.isnan(dense + sparse).all():
        assert found is None
    else:
        assert found.value == pytest.approx(2) and found.low == found.high == found.value


def test_nothing_answered_is_no_estimate() -> None:
    nothing = np.full((2, 3), math.nan)
    assert S.paired_bootstrap(nothing, nothing, S.median_ratio) is None


def test_sides_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        S.paired_bootstrap(np.ones((1, 2)), np.ones((1, 3)), S.median_ratio)


def test_the_same_seed_gives_the_same_interval() -> None:
    dense, sparse = seconds((2, 40, 1)), seconds((2, 40, 2))
    again = [S.paired_bootstrap(dense, sparse, S.median_ratio, seed=7) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0].low < again[0].value < again[0].high


def test_intervals_hold_what_they_promise() -> None:
    """Of 200 experiments about 95% of the intervals have the true ratio, 0.5, in them."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        dense = rng.lognormal(size=(1, 80))
        sparse = 0.5 * dense * rng.lognormal(sigma=0.3, size=(1, 80))
        found = S.paired_bootstrap(dense, sparse, S.median_ratio, seed=seed, draws=300)
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_requests_that_wait_together_widen_the_interval() -> None:
    """Drawn one by one, requests of one queue would look like many independent ones."""
    rng = np.random.default_rng(0)
    queues = np.repeat(rng.lognormal(sigma=0.5, size=(1, 60)), 8, axis=1)
    alone = rng.permutation(queues[0])[None]
    dense = np.ones_like(queues)
    together, apart = (
        S.paired_bootstrap(dense, sparse, S.median_ratio) for sparse in (queues, alone)
    )
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


@given(st.lists(st.floats(0.1, 3), min_size=1, max_size=6))
def test_the_crossover_is_where_sparse_begins_to_stay_faster(ratios: list[float]) -> None:
    tokens = [2.0 ** (8 + step) for step in range(len(ratios))]
    found = S.crossover(tokens, ratios)
    if ratios[-1] >= 1:
        assert found is None
    elif all(ratio < 1 for ratio in ratios):
        assert found == 0
    else:
        last = max(step for step, ratio in enumerate(ratios) if ratio >= 1)
        assert tokens[last] * (1 - 1e-9) <= found <= tokens[last + 1] * (1 + 1e-9)


def test_the_crossover_lies_on_the_line_over_the_logarithm() -> None:
    assert S.crossover([1024, 4096], [1.5, 0.5]) == pytest.approx(2048)
    assert S.crossover([], []) is None


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_common_prefix_is_a_share(one: str, other: str) -> None:
    share = S.common_prefix(one, other)
    assert 0 <= share <= 1
    assert share == S.common_prefix(other, one)
    assert (share == 1) is (one == other)


def test_how_much_of_a_text_is_common() -> None:
    assert S.common_prefix("abcd", "abxdef") == pytest.approx(2 / 6)
