"""What a calibration reads: the user's text, and made from it what a uniform rule would starve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from vllm_sparse_backend.calibrate.table import Group
from vllm_sparse_backend.tasks.catalog import Task, make_batches
from vllm_sparse_backend.tasks.items import Item
from vllm_sparse_backend.tasks.stream import TokenStream

# The user's text, half of it said twice (the heads that copy), and key-value pairs, asked for.
KINDS = (Task.TEXT, Task.COPY, Task.RECORDS)
GENERATED = 1  # token, which a length has room for
QUESTIONS = 192  # tokens of a document that are left to questions and their answers


@dataclass(frozen=True)
class Document:
    """Tokens of one prompt."""

    group: Group
    number: int  # among those of the group
    token_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.group.kind}-{self.group.length}-{self.number}"


def make_documents(
    streams: Sequence[TokenStream],
    kinds: Sequence[Task],
    lengths: Sequence[int],
    count: int,
    seed: int,
) -> list[Document]:
    """``count`` documents of every kind and length, the longest first. Raises TextError.

    The longest take most of the time, and memory: what fails for want of either fails soon.
    """
    documents = []
    for length in sorted(lengths, reverse=True):
        for kind in kinds:
            room = length - GENERATED
            asked = QUESTIONS if kind is Task.RECORDS else 0
            batches = make_batches(streams, kind, room - asked, count, seed)
            items = chain.from_iterable(batch.items for batch in batches)
            documents += [
                Document(Group(str(kind), length), number, _asked(item, streams[0], room))
                for number, item in enumerate(items)
            ]
    return documents


def _asked(item: Item, stream: TokenStream, room: int) -> tuple[int, ...]:
    """The context, and behind it as many questions with their answers as there is room for."""
    ids = list(item.token_ids)
    for question in item.questions:
        more = [*question.token_ids, *stream.encode(f" {question.expected}")]
        if len(ids) + len(more) > room:
            break
        ids += more
    return tuple(ids)
