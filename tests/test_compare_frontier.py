"""Which settings are worth having, what an error costs, and from which length on a method pays."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_backend.compare.frontier import (
    At,
    Efficiency,
    efficiency_length,
    envelope,
    time_to_reach,
    unbeaten,
)

LADDER = [At(0.001, 0.8), At(0.01, 0.4), At(0.1, 0.2)]
POINTS = st.lists(
    st.builds(At, st.floats(1e-4, 1.0), st.floats(1e-3, 2.0)), min_size=1, max_size=12
)


@pytest.mark.parametrize(
    ("error", "time"),
    [
        (0.0005, None),
        (0.001, 0.8),
        (math.sqrt(0.001 * 0.01), 0.6),  # half way in the logarithm
        (0.01, 0.4),
        (10**-1.5, 0.3),
        (0.01 * 10**0.25, 0.35),
        (0.1, 0.2),
        (0.9, 0.2),  # nothing is made up beyond the ladder
    ],
)
def test_time_to_reach_an_error(error: float, time: float | None) -> None:
    found = time_to_reach(LADDER, error)
    assert found == (None if time is None else pytest.approx(time))
    assert time_to_reach(LADDER[::-1], error) == found, "the order is of no matter"


def test_a_beaten_setting_does_not_bend_the_line() -> None:
    slow = [*LADDER, At(0.02, 0.9), At(0.01, 0.5)]
    assert time_to_reach(slow, 0.02) == time_to_reach(LADDER, 0.02)
    assert envelope(slow) == LADDER


def test_no_error_at_all_has_no_logarithm() -> None:
    exact = [At(0.0, 1.0), At(0.01, 0.5)]
    assert time_to_reach(exact, 0.0) == 1.0
    assert time_to_reach(exact, 0.005) == 1.0, "as much as is known to do"
    assert time_to_reach(exact, 0.01) == 0.5
    assert time_to_reach([], 0.01) is None


@given(points=POINTS, error=st.floats(1e-4, 1.0))
def test_an_interpolated_time_is_between_measured_ones(points: list[At], error: float) -> None:
    found = time_to_reach(points, error)
    within = [point.time for point in points if point.error <= error]
    if not within:
        assert found is None
    else:
        assert found is not None
        assert min(point.time for point in points) <= found <= min(within)


@given(points=POINTS)
def test_no_point_of_an_envelope_beats_another(points: list[At]) -> None:
    line = envelope(points)
    assert not any(one.beats(other) for one in points for other in line)
    assert all(any(one == point or one.beats(point) for one in line) for point in points), (
        "whatever is left out is beaten"
    )


def test_the_frontier_is_over_all_methods() -> None:
    methods = {
        "a": [At(0.01, 0.5), At(0.05, 0.3)],
        "b": [At(0.02, 0.4), At(0.06, 0.3), At(0.01, 0.5)],  # the last is no worse than a's
        "c": [At(0.02, 0.41)],
    }
    assert unbeaten(methods) == {
        "a": [At(0.01, 0.5), At(0.05, 0.3)],
        "b": [At(0.02, 0.4), At(0.01, 0.5)],
    }


@pytest.mark.parametrize(
    ("ratios", "want", "said"),
    [
        # 2 at 4096 and 1/2 at 16384: 1 at 8192, half way in both logarithms.
        ([(4096, 2.0), (16384, 0.5)], 8192.0, "8,192"),
        ([(4096, 4.0), (8192, 2.0), (16384, 0.5)], 8192 * math.sqrt(2), "11,585"),
        ([(4096, 0.9), (8192, 0.8)], 4096, "≤ 4,096"),
        ([(4096, 1.9), (8192, 1.1)], 8192, "> 8,192"),
        ([(4096, None), (8192, None)], None, "not reached"),
        ([(4096, None), (8192, 0.5)], 8192, "8,192"),
        ([(4096, 0.5), (8192, None)], 8192, "> 8,192"),
        # Faster, slower and faster again: for good from the second time on.
        ([(4096, 0.5), (8192, 2.0), (32768, 0.5)], 16384.0, "16,384"),
        ([(4096, 1.0)], 4096, "≤ 4,096"),
    ],
)
def test_efficiency_length(
    ratios: list[tuple[int, float | None]], want: float | None, said: str
) -> None:
    found = efficiency_length(ratios)
    assert found.length == (None if want is None else pytest.approx(want))
    assert str(found) == said
    assert isinstance(found, Efficiency)
