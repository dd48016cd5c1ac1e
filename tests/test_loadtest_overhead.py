"""loadtest/overhead.py: what it says of how far its ratios are from each other."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "loadtest"


@pytest.fixture(scope="module")
def overhead() -> Any:
    """The script as a module; loadtest/ is no package."""
    sys.path.insert(0, str(FOLDER))
    import overhead

    sys.path.remove(str(FOLDER))
    return overhead


def test_few_pairs_have_a_range_and_no_interval(overhead: Any) -> None:
    times = {"dense": [10.0, 20.0, 10.0], "sparse": [9.4, 19.8, 9.6]}
    assert overhead.told(times) == "0.940 to 0.990, the range of 3"


def test_many_pairs_have_an_interval(overhead: Any) -> None:
    draw = random.Random(1)
    dense = [10 + draw.random() for _ in range(40)]
    times = {"dense": dense, "sparse": [1.1 * one + 0.1 * draw.random() for one in dense]}
    low, high = overhead.interval(times)
    ratios = [ours / its for its, ours in zip(dense, times["sparse"], strict=True)]
    assert min(ratios) < low < high < max(ratios)
    assert overhead.told(times) == f"{low:.3f} to {high:.3f}"
