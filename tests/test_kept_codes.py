"""Which requests' codes are kept from step to step, and what of them is there already."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.ops.triton import Shelf, plan_work
from vllm_sparse_backend.ops.triton.kept import PATIENCE, Place


def chunks(prompt: int, size: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """(computed, context) of each step of a prompt."""
    for computed in range(first, prompt, size):
        yield computed, min(computed + size, prompt)


def test_a_prompts_chunks_find_what_the_one_before_has_left() -> None:
    shelf, places = Shelf(1, 5000), []
    for computed, context in chunks(4500, 1000):
        shelf.step()
        places.append(shelf.place(7, computed, context, 4500))
    assert places == [
        Place(0, 0, 0, 512, True),
        Place(0, 0, 0, 1024, True),  # a power of two more: a new mean, all codes anew
        Place(0, 0, 0, 2048, True),
        Place(0, 0, 2944, 2048, False),  # whole groups of 128 of the 3000
        Place(0, 0, 0, 4096, True),
    ]


def test_a_whole_prompt_and_the_last_chunk_keep_nothing() -> None:
    shelf = Shelf(1, 5000)
    shelf.step()
    assert shelf.place(1, 0, 4500, 4500) is None
    assert shelf.place(2, 0, 2000, 4500) is not None
    shelf.step()
    assert shelf.place(2, 2000, 4500, 4500) is not None
    # Its place is the next one's, but not in the same step, whose codes are still to be read.
    assert shelf.place(3, 0, 2000, 4500) is None
    shelf.step()
    assert shelf.place(3, 2000, 3000, 4500) == Place(0, 0, 0, 2048, True)


def test_places_are_taken_until_nobody_comes_back() -> None:
    shelf = Shelf(2, 1000)
    shelf.step()
    first, second, third = (shelf.place(r, 0, 600, 9000) for r in range(3))
    assert (first, second, third) == (
        Place(0, 0, 0, 512, True),
        Place(1, 1024, 0, 512, True),
        None,
    )
    for step in range(PATIENCE):  # the second goes on, and the first does not
        shelf.step()
        assert shelf.place(1, 600 + step, 601 + step, 9000) is not None
        assert shelf.place(2, 600, 700, 9000) is None
    shelf.step()
    assert shelf.place(2, 600, 700, 9000) == Place(0, 0, 0, 512, True)


def test_what_is_computed_again_is_quantized_again() -> None:
    shelf = Shelf(1, 5000)
    for computed, context, have in ((0, 2100, 0), (2100, 2300, 2048), (2176, 2400, 0)):
        shelf.step()
        place = shelf.place(1, computed, context, 5000)
        assert place is not None and (place.have, place.new_mean) == (have, have == 0)
    # Rows that were dense in between are quantized when their request is sparse again.
    shelf.step()
    place = shelf.place(1, 3000, 3100, 5000)
    assert place is not None and place.have == 2304


@settings(deadline=None, derandomize=True)
@given(size=st.integers(1, 3000), prompt=st.integers(1, 40000), first=st.integers(0, 20000))
def test_no_key_is_missed_and_none_made_more_than_three_times_on_average(
    size: int, prompt: int, first: int
) -> None:
    shelf, total = Shelf(1, 65536), 0
    codes = np.zeros(65536, int)  # which mean each key's code is about
    for computed, context in chunks(prompt, size, min(first, prompt - 1)):
        shelf.step()
        place = shelf.place(1, computed, context, prompt + 1)
        assert place is not None and place.mean_of <= context < 2 * place.mean_of
        work = plan_work(
            np.array([0, context - computed]), np.array([context]), [0], "cpu", None, {0: place}
        )
        made = sorted(work.chunks[:, 1].tolist())
        assert made == list(range(place.have, -(-context // 512) * 512, 128))
        codes[place.have : context] = place.mean_of
        assert (codes[:context] == place.mean_of).all()
        assert len(work.summed) == (-(-place.mean_of // 128) if place.new_mean else 0)
        total += context - place.have
    steps = -(-prompt // size)
    assert total <= 3 * prompt + 128 * steps


@pytest.mark.parametrize("together", [1, 2, 4, 8])
def test_rows_that_are_scored_together_are_of_one_request(together: int) -> None:
    starts, seq_lens = np.array([0, 300, 364, 400]), np.array([700, 64, 1000])
    work = plan_work(starts, seq_lens, [0, 1, 2], "cpu", np.array([9000, 64, 1000]))
    alone = work.slots(128, 1).tolist()
    rows = work.slots(128, 1, together)
    assert len(rows) % together == 0
    span = work.blocks[rows[:, 0].long(), 7].reshape(-1, together)
    assert (span == span[:, :1]).all()
    assert sorted(set(map(tuple, rows.tolist()))) == sorted(map(tuple, alone))
    # Of the first request, whose prompt goes on, only what is there of a block is no pattern.
    edges = work.blocks[work.slots(128, 1)[:, 0].long()]
    whole = [w for (_, _, w), edge in zip(alone, edges.tolist(), strict=True) if edge[0] == 0]
    assert sum(whole) == 3 and len(whole) == 3 + 2 * 4
