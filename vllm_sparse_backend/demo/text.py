"""Long real documents without a download: Python's own help topics and library sources.

A document has exactly the number of tokens asked for, mixes prose with code, and hides needles:
sentences that state a number under a name of its own. The questions use the needle's own words,
because small models answer those and hardly any other wording.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

# Modules of the standard library that every CPython ships as source, of ordinary code with
# docstrings; long tables (mimetypes, html.entities) and generated code are not among them.
MODULES = """
argparse ast asyncio/base_events asyncio/streams bdb calendar configparser csv dataclasses
difflib doctest enum fractions ftplib functools gettext gzip heapq http/client http/cookiejar
imaplib inspect ipaddress json/decoder logging/__init__ mailbox optparse pathlib pdb pickle
plistlib poplib pprint profile queue random sched selectors shelve shlex shutil smtplib
socketserver statistics string subprocess tarfile tempfile textwrap threading timeit tokenize
trace traceback typing unittest/case unittest/mock urllib/parse urllib/request uuid weakref
zipfile/__init__
"""
NAMES = (
    "pass key", "door code", "locker number", "flight number", "phone extension", "account number",
    "parcel number", "room number", "case number", "ticket number",
)  # fmt: skip
DIGITS = 5
BLOCK_CHARACTERS = 600  # some paragraphs go on for pages; needles go between blocks
SECTION_CHARACTERS = 4000  # short enough that a 2K document has both prose and code in it
ANSWER_TOKENS = 10  # the digits, a space, and a little more to see how the model goes on


@dataclass(frozen=True)
class Needle:
    """A number stated once, at `depth` (0 to 1) of its document."""

    name: str
    answer: str
    depth: float

    @property
    def sentence(self) -> str:
        return f"The {self.name} is {self.answer}. Remember it."

    @property
    def question(self) -> str:
        """What is put after the document; the model's continuation is its answer."""
        return f"\n\nRemember it. The {self.name} is"

    def right(self, continuation: str) -> bool:
        """Whether `continuation` begins with the number, and with no longer one."""
        return re.match(rf"\s*{self.answer}(?!\d)", continuation) is not None


@dataclass(frozen=True)
class Document:
    """`token_ids` as they are sent, special tokens at the start included."""

    token_ids: tuple[int, ...]
    needles: tuple[Needle, ...]

    def prompt(self, tokenizer: Any, needle: Needle) -> list[int]:
        """The document with the needle's question behind it."""
        return [*self.token_ids, *_encode(tokenizer, needle.question)]


def build_document(
    tokenizer: Any, tokens: int, *, seed: int, depths: Sequence[float] = ()
) -> Document:
    """A document of exactly `tokens` tokens with a needle at each of `depths`.

    `tokenizer` is a transformers tokenizer. The same arguments (and the same version of Python,
    whose text it is) give the same document. Raises ValueError if the needles do not fit or if
    there are more of them than names.
    """
    if len(depths) > len(NAMES) or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths: want at most {len(NAMES)} numbers in 0..1, got {list(depths)}")
    rng = random.Random(seed)
    names = rng.sample(NAMES, len(depths))
    needles = [
        Needle(name, "".join(rng.choices("123456789", k=DIGITS)), depth)
        for name, depth in zip(names, sorted(depths), strict=True)
    ]
    planted = [_encode(tokenizer, f"{needle.sentence}\n\n") for needle in needles]
    start = leading_specials(tokenizer)
    room = tokens - len(start) - sum(map(len, planted))
    if room <= 0:
        raise ValueError(f"tokens: {len(needles)} needles do not fit into {tokens}")

    # Block by block: a needle goes between two, at the first place at or behind its depth.
    ids: list[int] = []
    filled = 0
    for text in _blocks(rng):
        while planted and filled >= needles[-len(planted)].depth * room:
            ids += planted.pop(0)
        block = _encode(tokenizer, text)[: room - filled]
        ids += block
        filled += len(block)
        if filled == room:
            break
    # The last block is cut off where the room ends, wherever that is.
    return Document((*start, *ids, *chain.from_iterable(planted)), tuple(needles))


def _blocks(rng: random.Random) -> Iterator[str]:
    """Whole lines of text, endlessly; topics and sources take turns."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    sources = [path for name in MODULES.split() if (path := library / f"{name}.py").is_file()]
    if not sources:
        raise RuntimeError(f"no library sources in {library}: the demo takes its text from them")
    prose = [topics[name] for name in sorted(topics) if len(topics[name]) > SECTION_CHARACTERS // 4]
    rng.shuffle(prose)
    rng.shuffle(sources)
    for turn in count():  # a document longer than all there is begins again
        yield from _section(prose[turn % len(prose)], rng)
        path = sources[turn % len(sources)]
        yield f"# {path.relative_to(library)}\n\n"
        yield from _section(path.read_text(encoding="utf-8"), rng)


def _section(text: str, rng: random.Random) -> Iterator[str]:
    """Consecutive blocks of `text` from a random place on, about `SECTION_CHARACTERS` in all."""
    skip = rng.uniform(0, max(0, len(text) - SECTION_CHARACTERS))
    taken = 0
    for paragraph in re.split(r"\n[ \t]*\n+", text):
        if skip > 0:
            skip -= len(paragraph)
        elif taken < SECTION_CHARACTERS and paragraph.strip():
            taken += len(paragraph)
            yield from _cut(paragraph.rstrip() + "\n\n")


def _cut(paragraph: str) -> Iterator[str]:
    """`paragraph`, in pieces of whole lines if it is long."""
    piece = ""
    for line in paragraph.splitlines(keepends=True):
        piece += line
        if len(piece) >= BLOCK_CHARACTERS:
            yield piece
            piece = ""
    yield piece


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def leading_specials(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text, such as <bos>."""
    bare, whole = _encode(tokenizer, "x"), list(tokenizer.encode("x"))
    return whole[: len(whole) - len(bare)] if whole[-len(bare) :] == bare else []
