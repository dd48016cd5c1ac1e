"""What the demo takes for the figures of a side, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from vllm_sparse_backend.demo.ask import Counts, Reply
from vllm_sparse_backend.demo.run import what_is_wrong
from vllm_sparse_backend.demo.serve import Side

REPLY = Reply(text="", ttft_seconds=1.0, prompt_tokens=4000, cached_tokens=0)
NOTHING = Counts()
SPARSE = Counts(sparse_layer_tokens=100, computed_tiles=40, causal_tiles=100)
KEPT_ALL = Counts(computed_tiles=100, causal_tiles=100)


@pytest.mark.parametrize(
    ("side", "long", "counted", "wrong"),
    [
        ("dense", True, NOTHING, None),
        ("dense", True, SPARSE, "the dense server counted"),
        ("dense", False, KEPT_ALL, "the dense server counted"),
        ("sparse", True, SPARSE, None),
        ("sparse", True, NOTHING, "nothing of it was prefilled sparsely"),
        ("sparse", True, KEPT_ALL, "nothing of it was prefilled sparsely"),
        ("sparse", False, NOTHING, None),
        ("sparse", False, KEPT_ALL, None),
        ("sparse", False, SPARSE, "should have been dense"),
    ],
)
def test_a_side_counts_what_it_should(
    side: Side, long: bool, counted: Counts, wrong: str | None
) -> None:
    found = what_is_wrong(side, long, REPLY, counted)
    assert found is None if wrong is None else found is not None and wrong in found


def test_a_prompt_from_the_cache_is_no_prefill() -> None:
    cached = dataclasses.replace(REPLY, cached_tokens=16)
    assert what_is_wrong("sparse", True, cached, SPARSE) == "16 tokens were in the prefix cache"
