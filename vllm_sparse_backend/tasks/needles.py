"""Sentences hidden in text, each asked for in its own words.

All needles of a haystack are asked over one prefill, which the prefix cache keeps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vllm_sparse_backend.demo.text import DIGITS, NAMES, Needle
from vllm_sparse_backend.tasks.haystack import hide
from vllm_sparse_backend.tasks.items import Item, Question
from vllm_sparse_backend.tasks.stream import TokenStream

DEPTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
KEY_DEPTHS = (0.125, 0.375, 0.625, 0.875)
# Of one pattern, so that a model that finds a key, but not the one asked for, is wrong.
PLACES = (
    "Athens", "Berlin", "Dublin", "Lisbon", "London", "Madrid", "Oslo", "Paris", "Prague", "Rome",
    "Vienna", "Warsaw",
)  # fmt: skip


def needles(stream: TokenStream, tokens: int, count: int, rng: random.Random) -> list[Item]:
    """`count` haystacks of `tokens` tokens, with ten numbers under ten names in each."""
    return [
        _hide(stream, text, tokens, DEPTHS, rng.sample(NAMES, len(DEPTHS)), rng)
        for text in stream.slices(tokens, count, rng)
    ]


def multikey(stream: TokenStream, tokens: int, count: int, rng: random.Random) -> list[Item]:
    """The same with four keys of one name, told apart by a place."""
    return [
        _hide(
            stream,
            text,
            tokens,
            KEY_DEPTHS,
            [f"pass key of {place}" for place in rng.sample(PLACES, len(KEY_DEPTHS))],
            rng,
        )
        for text in stream.slices(tokens, count, rng)
    ]


def _hide(
    stream: TokenStream,
    text: Sequence[int],
    tokens: int,
    depths: Sequence[float],
    names: Sequence[str],
    rng: random.Random,
) -> Item:
    """As much of `text` as `tokens` leave room for, with a needle at each depth (ascending)."""
    hidden = [
        Needle(name, "".join(rng.choices("123456789", k=DIGITS)), depth)
        for name, depth in zip(names, depths, strict=True)
    ]
    planted = [stream.encode(f"\n\n{needle.sentence}\n\n") for needle in hidden]
    asked = [
        Question(needle.name, tuple(stream.encode(needle.question)), needle.answer, needle.depth)
        for needle in hidden
    ]
    rng.shuffle(asked)  # the first is a prefill of its own: it shall not always be the same depth
    return Item(hide(stream.specials, text, tokens, planted, depths), tuple(asked))
