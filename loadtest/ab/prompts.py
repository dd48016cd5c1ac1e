"""The prompts of a workload: real text of exactly as many tokens as asked for, the same every time.

Random tokens would not do: how sparse attention is depends on the text.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from vllm_sparse_backend.demo.text import DIGITS, NAMES, Needle
from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.tasks.source import read_sources

from .workload import Requests, Workload

PARAGRAPH = "\n\n"
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on average: what is too much is cut off
TRIES = 32  # at a cut before fillers are tried, which nearly always ends it
PASSAGES = 8
# Tokens, about: of a hidden number with the question for it, of what stands above a passage.
QUESTION, HEADING = 64, 8
ASKED = 4  # needles in a document that several requests share


class Prompt(BaseModel):
    """One request, without its text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: str  # the name of its kind in the workload
    prompt_tokens: int
    output_tokens: int
    answer: str | None = None  # the number that is asked for

    def right(self, continuation: str) -> bool | None:
        """Whether `continuation` begins with the answer; None where nothing was asked."""
        if self.answer is None:
            return None
        return Needle("", self.answer, 0.0).right(continuation)


@dataclass(frozen=True)
class Dataset:
    """All requests of one repetition, in the order they are sent."""

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """What was made, as requests.json, and for `vllm bench serve --dataset-name custom`, a JSON
        object a line; the path of that file."""
        made = TypeAdapter(tuple[Prompt, ...]).dump_json(self.prompts, indent=1)
        (folder / "requests.json").write_bytes(made + b"\n")
        path = folder / "dataset.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for prompt, text in zip(self.prompts, self.texts, strict=True):
                line = {"prompt": text, "output_tokens": prompt.output_tokens}
                file.write(json.dumps(line) + "\n")
        return path


def make_dataset(workload: Workload, tokenizer: Any) -> Dataset:
    """`tokenizer`: a fast transformers tokenizer. The same workload, tokenizer and version of
    Python give the same dataset. Raises TextError if there is too little text."""
    rng = random.Random(f"{workload.name} {workload.seed}")
    maker = _Maker(Fitter(tokenizer), _Texts([Path(each) for each in workload.text], rng), rng)
    # Spread evenly but for a jitter: shuffled, a short run would have the clumps of an accident.
    made = [
        ((number + rng.random()) / requests.count, prompt, text)
        for requests in workload.requests
        for number, (prompt, text) in enumerate(maker.make(requests))
    ]
    made.sort(key=lambda each: each[0])
    return Dataset(tuple(prompt for _, prompt, _ in made), tuple(text for _, _, text in made))


class Fitter:
    """Cuts text so that a tokenizer makes exactly so many tokens of it."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise TextError(
                "tokenizer: want a fast one, which says where in the text its tokens are"
            )
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        """Tokens of a prompt, special ones in front included, as the server counts them."""
        return len(self._tokenizer(text, verbose=False).input_ids)

    def ends(self, text: str) -> list[int]:
        """Where in `text` each of its tokens ends, in characters."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [end for _, end in encoded.offset_mapping]

    def fit(self, head: str, body: str, tail: str, tokens: int) -> str:
        """`head`, as much of `body` as there is room for, and `tail`: `tokens` tokens in all.

        Raises TextError if `body` is too short or if there is no room.
        """
        ends = self.ends(body)
        kept = tokens - self.count(head + tail)
        if not 0 <= kept <= len(ends):
            raise TextError(
                f"text: want {tokens} tokens, of which {tokens - kept} are not the text's own; "
                f"got a text of {len(ends)}"
            )
        # Where parts meet, tokens merge or split: what that comes to is seen and made up for.
        for _ in range(TRIES):
            text = head + body[: ends[kept - 1] if kept else 0] + tail
            wrong = tokens - self.count(text)
            if not wrong:
                return text
            kept = max(0, min(len(ends), kept + wrong))
        for fewer in range(min(kept, TRIES)):
            for words in range(TRIES):
                text = head + body[: ends[kept - fewer - 1]] + " a" * words + tail
                if self.count(text) == tokens:
                    return text
        raise TextError(f"text: found no cut that makes {tokens} tokens")


class _Texts:
    """Places in the sources where a prompt may begin, each used once: prompts that begin alike
    would share the prefix cache."""

    def __init__(self, paths: Sequence[Path], rng: random.Random) -> None:
        self._sources = [PARAGRAPH.join(source.texts) for source in read_sources(paths)]
        self._rng = rng
        self._used: set[str] = set()

    def take(self, characters: int) -> str:
        """So much text from some paragraph on, going on at a source's beginning behind its end."""
        for _ in range(1000):
            source = self._rng.choice(self._sources)
            at = source.find(PARAGRAPH, self._rng.randrange(len(source)))
            start = 0 if at < 0 else at + len(PARAGRAPH)
            text = source[start:].lstrip() + PARAGRAPH
            while len(text) < characters:
                text += source
            # Blocks of the prefix cache are shared if they are alike from the first token on.
            if (begins := text[:64]) not in self._used:
                self._used.add(begins)
                return text[:characters]
        raise TextError("text: every paragraph of it begins a prompt already; name more text")


@dataclass(frozen=True)
class _Maker:
    fitter: Fitter
    texts: _Texts
    rng: random.Random

    def make(self, requests: Requests) -> Iterator[tuple[Prompt, str]]:
        prefixes = list(self._prefixes(requests)) if requests.kind == "shared_prefix" else []
        for number in range(requests.count):
            tokens = self._length(requests)
            needle = None
            if requests.kind == "text":
                text = self.fitter.fit("", self._body(tokens), "", tokens)
            elif requests.kind == "question":
                text, (needle,) = self._hide(self._body(tokens), tokens, 1)
            elif requests.kind == "passages":
                text, (needle,) = self._hide(
                    self._passages(tokens, requests.passages or PASSAGES), tokens, 1
                )
            else:
                prefix, needles = prefixes[number % len(prefixes)]
                needle = self.rng.choice(needles)
                text = self.fitter.fit(prefix, self._body(tokens), needle.question, tokens)
            prompt = Prompt(
                requests=requests.name,
                prompt_tokens=tokens,
                output_tokens=requests.output_tokens,
                answer=None if needle is None else needle.answer,
            )
            yield prompt, text

    def _length(self, requests: Requests) -> int:
        low, high = math.log(requests.shortest), math.log(requests.longest)
        return min(requests.longest, round(math.exp(self.rng.uniform(low, high))))

    def _body(self, tokens: int) -> str:
        return self.texts.take(CHARACTERS_PER_TOKEN * tokens)

    def _passages(self, tokens: int, count: int) -> str:
        """Pieces of about equal length; the last goes on, to be cut where the room ends."""
        each = max(1, (tokens - QUESTION) // count - HEADING)
        pieces = []
        for _ in range(count - 1):
            text = self._body(each)
            pieces.append(text[: (self.fitter.ends(text)[:each] or [0])[-1]])
        pieces.append(self._body(tokens))
        return PARAGRAPH.join(
            f"Passage {number}{PARAGRAPH}{piece}" for number, piece in enumerate(pieces, 1)
        )

    def _prefixes(self, requests: Requests) -> Iterator[tuple[str, list[Needle]]]:
        tokens = requests.prefix_tokens or 0  # which the workload has checked
        for _ in range(requests.prefixes or 1):
            yield self._hide(self._body(tokens), tokens, ASKED, asked=False)

    def _hide(
        self, body: str, tokens: int, count: int, asked: bool = True
    ) -> tuple[str, list[Needle]]:
        """`body` with numbers hidden in it, the first of them asked for at its end if `asked`."""
        needles = [
            Needle(name, "".join(self.rng.choices("123456789", k=DIGITS)), self.rng.uniform(0, 0.9))
            for name in self.rng.sample(NAMES, count)
        ]
        ends = self.fitter.ends(body)
        room = ends[min(len(ends), tokens) - 1]
        # From behind, so that what is planted does not move the places before it.
        for needle in sorted(needles, key=lambda each: -each.depth):
            at = body.rfind("\n", 0, round(needle.depth * room)) + 1
            body = f"{body[:at]}\n{needle.sentence}\n\n{body[at:]}"
        text = self.fitter.fit("", body, needles[0].question if asked else "", tokens)
        if any(needle.sentence not in text for needle in needles):
            raise TextError(f"text: want room for {count} numbers, got {tokens} tokens")
        return text, needles
