"""What the generators make: prompts as token ids, with questions or with a range to score."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """Asked behind a context; the model's greedy continuation is its answer."""

    name: str  # what is asked for, in a few words
    token_ids: tuple[int, ...]  # to append to the context
    expected: str
    depth: float  # 0..1, where in the context the answer stands

    def right(self, continuation: str) -> bool:
        """Whether `continuation` begins with what is expected, and with no longer word."""
        return re.match(rf"\s*{re.escape(self.expected)}(?!\w)", continuation) is not None


@dataclass(frozen=True)
class Item:
    """One document: a context that is asked about, or text whose likelihood counts."""

    token_ids: tuple[int, ...]  # special tokens at the start included
    questions: tuple[Question, ...] = ()
    scored: int | None = None  # the losses of token_ids[scored:] count; None: of no token
