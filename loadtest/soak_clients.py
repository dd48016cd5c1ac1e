"""Clients that keep a server busy: they ask, go on with a document, and hang up."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NAME = "model"
REQUEST_SECONDS = 600.0
LONG_ANSWER, SHORT_ANSWER = 64, 16  # tokens
KINDS = ("short", "long", "continued", "hung up on", "given up")
WEIGHTS = (4, 2, 2, 1, 1)


@dataclass
class Load:
    """What all clients have done so far."""

    done: Counter[str] = field(default_factory=Counter)  # by kind
    prompt_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, tokens: int) -> None:
        """A request that ended as it should."""
        with self.lock:
            self.done[kind] += 1
            self.prompt_tokens += tokens

    def fail(self, kind: str, error: Exception) -> None:
        """One that did not."""
        with self.lock:
            self.errors.append(f"{kind}: {type(error).__name__}: {error}")


class Client(threading.Thread):
    """Asks one question after the other until told to stop."""

    def __init__(
        self, url: str, draw: random.Random, source: list[int], longest: int, load: Load
    ) -> None:
        """``source``: the tokens that prompts are cut from; ``longest``: of a prompt."""
        super().__init__(daemon=True)
        from openai import OpenAI

        self._client = OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS
        )
        self._draw, self._source, self._longest, self._load = draw, source, longest, load
        self._document: list[int] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """Until `stop` is set; what fails is written down."""
        while not self.stop.is_set():
            (kind,) = self._draw.choices(KINDS, WEIGHTS)
            prompt = self._prompt(kind)
            try:
                self._ask(kind, prompt)
            except Exception as error:  # whatever it is, it is a finding
                self._load.fail(kind, error)
                self.stop.wait(1.0)
            else:
                self._load.add(kind, len(prompt))

    def _prompt(self, kind: str) -> list[int]:
        if kind == "short":
            return self._pick(self._draw.randrange(16, 512))
        if kind == "continued" and self._document:
            longer = self._document + self._pick(self._draw.randrange(16, 512))
            self._document = longer if len(longer) < self._longest else []
            return longer[: self._longest]
        self._document = self._pick(self._draw.randrange(self._longest // 2, self._longest))
        return self._document

    def _pick(self, length: int) -> list[int]:
        start = self._draw.randrange(len(self._source) - length)
        return self._source[start : start + length]

    def _ask(self, kind: str, prompt: list[int]) -> None:
        from openai import APITimeoutError

        if kind == "given up":
            client = self._client.with_options(timeout=self._draw.uniform(0.01, 1.0))
            try:
                stream(client, prompt, LONG_ANSWER)
            except APITimeoutError:
                return
        elif kind == "hung up on":
            stream(self._client, prompt, LONG_ANSWER, until=self._draw.randrange(LONG_ANSWER))
        else:
            tokens = SHORT_ANSWER if kind == "long" else LONG_ANSWER
            if (came := stream(self._client, prompt, tokens)) != tokens:
                raise RuntimeError(f"want {tokens} tokens, got {came}")


def stream(client: Any, prompt: list[int], tokens: int, until: int | None = None) -> int:
    """Ask for so many tokens; hang up after ``until``. Returns how many have come."""
    answer = client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    came = 0
    with answer:
        for number, chunk in enumerate(answer):
            if until is not None and number >= until:
                break
            if chunk.usage is not None:
                came = chunk.usage.completion_tokens
    return came
