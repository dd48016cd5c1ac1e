"""The tasks by name, and how their documents are made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from vllm_sparse_backend.tasks import needles, pairs, text
from vllm_sparse_backend.tasks.items import Item
from vllm_sparse_backend.tasks.stream import TokenStream


class Task(StrEnum):
    """Their names on the command line and in eval.json."""

    TEXT = "text"
    COPY = "copy"
    NEEDLES = "needles"
    MULTIKEY = "multikey"
    RECORDS = "records"
    RECALL = "recall"


Make = Callable[[TokenStream, int, int, random.Random], list[Item]]
_MAKERS: dict[Task, Make] = {
    Task.TEXT: text.plain,
    Task.COPY: text.copy,
    Task.NEEDLES: needles.needles,
    Task.MULTIKEY: needles.multikey,
    Task.RECORDS: pairs.records,
    Task.RECALL: pairs.recall,
}


LIKELIHOOD = (Task.TEXT, Task.COPY)  # the others ask questions


@dataclass(frozen=True)
class Batch:
    """The documents of one task and length."""

    task: Task
    text: str  # the names of the sources they are made of
    tokens: int  # of a document, exactly
    items: tuple[Item, ...]


def make_batches(
    streams: Sequence[TokenStream], task: Task, tokens: int, count: int, seed: int
) -> list[Batch]:
    """Documents of exactly `tokens` tokens: of a task of likelihood, `count` from every stream, as
    their perplexities are not to be mixed; else `count` in all, from the streams in turn.

    The same arguments give the same documents. Raises TextError if a stream is too short, or if
    `tokens` are too few for the task.
    """

    def items(stream: TokenStream, share: int) -> list[Item]:
        rng = random.Random(f"{task} {stream.name} {tokens} {seed}")
        return _MAKERS[task](stream, tokens, share, rng) if share else []

    if task in LIKELIHOOD:
        return [Batch(task, stream.name, tokens, tuple(items(stream, count))) for stream in streams]
    shares = [len(range(turn, count, len(streams))) for turn in range(len(streams))]
    mixed = [items(stream, share) for stream, share in zip(streams, shares, strict=True)]
    used = [stream.name for stream, share in zip(streams, shares, strict=True) if share]
    return [Batch(task, "+".join(used), tokens, tuple(chain.from_iterable(mixed)))]
