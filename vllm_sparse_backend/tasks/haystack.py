"""Something hidden in text, to the token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vllm_sparse_backend.errors import TextError


def hide(
    specials: Sequence[int],
    text: Sequence[int],
    tokens: int,
    hidden: Sequence[Sequence[int]],
    depths: Sequence[float],
) -> tuple[int, ...]:
    """`tokens` tokens: `specials`, then as much of `text` as there is room for, with one of
    `hidden` at each of `depths` (ascending, 0..1 of the text).

    Raises TextError if more than half would be hidden.
    """
    room = tokens - len(specials) - sum(map(len, hidden))
    if 2 * room < tokens:
        raise TextError(
            f"length: what is hidden takes {tokens - room} of {tokens} tokens; want a length of "
            "twice that"
        )
    ids = list(specials)
    edges = [0, *(round(depth * room) for depth in depths), room]
    for planted, (start, end) in zip([(), *hidden], pairwise(edges), strict=True):
        ids += planted
        ids += text[start:end]
    return tuple(ids)
