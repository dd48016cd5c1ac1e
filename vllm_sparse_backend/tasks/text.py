"""Text whose likelihood counts: as it is, and said twice."""

from __future__ import annotations

import random

from vllm_sparse_backend.tasks.items import Item
from vllm_sparse_backend.tasks.stream import TokenStream


def plain(stream: TokenStream, tokens: int, count: int, rng: random.Random) -> list[Item]:
    """`count` documents of `tokens` tokens, scored on their second half: the longer contexts."""
    start = stream.specials
    return [
        Item((*start, *ids), scored=tokens // 2)
        for ids in stream.slices(tokens - len(start), count, rng)
    ]


def copy(stream: TokenStream, tokens: int, count: int, rng: random.Random) -> list[Item]:
    """Half a document and the same again, scored on the repetition.

    The heads that find the earlier occurrence look at one far place each: what a selector drops
    first shows here.
    """
    start = stream.specials
    half = (tokens - len(start)) // 2
    odd = (tokens - len(start)) % 2  # a token more in front, which is not repeated
    return [
        Item((*start, *ids, *ids[odd:]), scored=len(start) + odd + half)
        for ids in stream.slices(half + odd, count, rng)
    ]
