"""Keys and values: a list of pairs in text, some of them asked for.

`records` is key-value retrieval: lines of a word and a number. `recall` is multi-query associative
recall (Arora et al., Zoology, 2023, section 3): pairs of words, each a single token, so that one
look back decides. There are so many pairs at most, in groups among text: a list that filled a long
context would be beyond a small model whatever the attention.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.tasks.haystack import hide
from vllm_sparse_backend.tasks.items import Item, Question
from vllm_sparse_backend.tasks.stream import TokenStream

GROUPS = 8  # of pairs, with text between them; one pair of each is asked for
RECORD_DIGITS = 3
WORDS = 2048  # the first of them in the vocabulary, which are the more frequent
WORD = re.compile(r"[a-z]{4,}")


@dataclass(frozen=True)
class _Form:
    """How pairs are written and asked for."""

    pairs: int  # at most
    line: str
    question: str


RECORDS = _Form(128, "{key}: {value}\n", "{key}:")
RECALL = _Form(32, "{key}: {value}\n", "{key}:")


def records(stream: TokenStream, tokens: int, count: int, rng: random.Random) -> list[Item]:
    """`count` documents of `tokens` tokens with lines of a word and a number of three digits."""
    documents = []
    for text in stream.slices(tokens, count, rng):
        keys = rng.sample(_fresh(stream, text, RECORDS.pairs), RECORDS.pairs)
        values = ["".join(rng.choices("123456789", k=RECORD_DIGITS)) for _ in keys]
        documents.append(_document(stream, text, tokens, RECORDS, keys, values, rng))
    return documents


def recall(stream: TokenStream, tokens: int, count: int, rng: random.Random) -> list[Item]:
    """`count` documents of `tokens` tokens with pairs of words, no word in two of them."""
    documents = []
    for text in stream.slices(tokens, count, rng):
        chosen = rng.sample(_fresh(stream, text, 2 * RECALL.pairs), 2 * RECALL.pairs)
        keys, values = chosen[::2], chosen[1::2]
        documents.append(_document(stream, text, tokens, RECALL, keys, values, rng))
    return documents


def _fresh(stream: TokenStream, text: Sequence[int], wanted: int) -> list[str]:
    """Words that `text` does not hold itself. Raises TextError if they are too few."""
    used = set(WORD.findall(stream.tokenizer.decode(text).lower()))
    fresh = [word for word in _words(stream.tokenizer) if word not in used]
    if len(fresh) < wanted:
        raise TextError(
            f"pairs: want {wanted} words of one token that the text does not hold, got {len(fresh)}"
        )
    return fresh


@lru_cache(maxsize=4)
def _words(tokenizer: Any) -> tuple[str, ...]:
    """Words that are one token each behind a space."""
    found: dict[str, None] = {}
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip()
        if WORD.fullmatch(word) and tokenizer.encode(
            f" {word}", add_special_tokens=False, verbose=False
        ) == [token]:
            found[word] = None
        if len(found) == WORDS:
            break
    return tuple(found)


def _document(
    stream: TokenStream,
    text: Sequence[int],
    tokens: int,
    form: _Form,
    keys: Sequence[str],
    values: Sequence[str],
    rng: random.Random,
) -> Item:
    """As many of the pairs as take half of the document, in groups among `text`."""
    lines = [
        stream.encode(form.line.format(key=key, value=value))
        for key, value in zip(keys, values, strict=True)
    ]
    space = stream.encode("\n\n")
    room = tokens // 2 - len(stream.specials) - 2 * GROUPS * len(space)
    size = min(len(lines), room // max(map(len, lines))) // GROUPS
    if size < 1:
        raise TextError(f"length: {GROUPS} pairs take more than half of {tokens} tokens")
    hidden, asked = [], []
    for number in range(GROUPS):
        group = range(size * number, size * (number + 1))
        hidden.append([*space, *chain.from_iterable(lines[pair] for pair in group), *space])
        pair = rng.choice(group)
        question = (*space, *stream.encode(form.question.format(key=keys[pair])))
        asked.append(Question(keys[pair], question, values[pair], (number + 0.5) / GROUPS))
    depths = [question.depth for question in asked]
    rng.shuffle(asked)  # the first is a prefill of its own: it shall not always be the same depth
    return Item(hide(stream.specials, text, tokens, hidden, depths), tuple(asked))
