"""A source as tokens, and disjoint documents of them."""

from __future__ import annotations

import random
from functools import cached_property
from itertools import chain
from typing import Any

from vllm_sparse_backend.demo.text import leading_specials
from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.tasks.source import Source


class TokenStream:
    """All of a source's tokens in a row, by a transformers tokenizer."""

    def __init__(self, tokenizer: Any, source: Source) -> None:
        self.tokenizer, self.source = tokenizer, source

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @cached_property
    def specials(self) -> tuple[int, ...]:
        """What stands in front of every document, such as <bos>."""
        return tuple(leading_specials(self.tokenizer))

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """Of the whole source, without special tokens."""
        return tuple(chain.from_iterable(map(self.encode, self.source.texts)))

    def encode(self, text: str) -> list[int]:
        """Without special tokens, and without a warning about a long text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def slices(self, tokens: int, count: int, rng: random.Random) -> list[tuple[int, ...]]:
        """`count` slices of exactly `tokens` tokens, no two of which overlap, in random order.

        Raises TextError if the source is too short for them.
        """
        spare = len(self.ids) - tokens * count
        if spare < 0:
            raise TextError(
                f"text {', '.join(self.source.read)}: want {tokens * count} tokens for {count} "
                f"documents of {tokens}, got {len(self.ids)}"
            )
        # Sorted, each is moved on by the slices before it, so that none overlap.
        starts = sorted(rng.randint(0, spare) for _ in range(count))
        slices = [
            self.ids[start + tokens * n : start + tokens * (n + 1)]
            for n, start in enumerate(starts)
        ]
        rng.shuffle(slices)
        return slices
