"""What one side makes of one document, and how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sparse_backend.config import session_directory
from vllm_sparse_backend.metrics import counters, read_totals
from vllm_sparse_backend.tasks.items import Item

ANSWER_TOKENS = 10  # five digits, a space, and a little more to see where the answer ends
CONTINUED = 32  # tokens generated behind a text, to see for how long both sides agree
RESERVE = 64  # tokens of a length left to question and answer, or to the continuation
WARM_UP_TOKENS = 2304  # long enough that the sparse side warms up what it is measured at


@dataclass(frozen=True)
class Counts:
    """Totals of the sparse backend's counters; all 0 where there are none."""

    sparse_tokens: float = 0.0  # layer tokens
    all_tokens: float = 0.0
    computed: float = 0.0  # tiles
    causal: float = 0.0

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(
            self.sparse_tokens - earlier.sparse_tokens,
            self.all_tokens - earlier.all_tokens,
            self.computed - earlier.computed,
            self.causal - earlier.causal,
        )


@dataclass(frozen=True)
class Reading:
    """What one side made of one document."""

    losses: tuple[float, ...] = ()  # nats of the scored tokens
    continuation: tuple[int, ...] = ()  # greedy, of a text
    answers: tuple[str, ...] = ()  # in the order of the questions
    ttft: float | None = None  # seconds to the first answer's first token, on a cold cache
    counts: Counts = field(default_factory=Counts)  # of the first prefill and its answer


class Reader:
    """Asks one engine, one request at a time."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def warm_up(self, ids: Sequence[int]) -> None:
        """So that no document pays for what is done once."""
        self._generate(ids[:WARM_UP_TOKENS], "warm-up", ANSWER_TOKENS)
        self._generate(ids[:64], "warm-up", 1, scored=True)  # vLLM compiles its ranking

    def read(self, item: Item, salt: str) -> Reading:
        """`salt`: unlike any other document's, which might begin with the same tokens."""
        before = _counts()
        if item.scored is not None:
            output = self._generate(item.token_ids, salt, CONTINUED, scored=True)
            return Reading(
                losses=_losses(output, item.scored),
                continuation=tuple(output.outputs[0].token_ids),
                counts=_counts() - before,
            )
        answers: list[str] = []
        ttft, counted = None, Counts()
        for question in item.questions:
            output = self._generate((*item.token_ids, *question.token_ids), salt, ANSWER_TOKENS)
            if not answers:
                ttft, counted = output.metrics.first_token_latency, _counts() - before
            answers.append(output.outputs[0].text)
        return Reading(answers=tuple(answers), ttft=ttft, counts=counted)

    def _generate(
        self, ids: Sequence[int], salt: str, max_tokens: int, scored: bool = False
    ) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,  # continuations are compared, and answers cut, by ourselves
            prompt_logprobs=0 if scored else None,  # of the prompt's own tokens and no others
        )
        prompt: Any = {"prompt_token_ids": list(ids), "cache_salt": salt}
        return self._llm.generate([prompt], parameters, use_tqdm=False)[0]


def _losses(output: Any, scored: int) -> tuple[float, ...]:
    ids, entries = output.prompt_token_ids[scored:], output.prompt_logprobs[scored:]
    return tuple(-float(entry[token].logprob) for token, entry in zip(ids, entries, strict=True))


def _counts() -> Counts:
    """What this process's engines have counted so far."""
    directory = session_directory()
    if directory is None:
        return Counts()
    totals = read_totals(directory)
    return Counts(
        sparse_tokens=totals.values.get(counters.SPARSE, 0.0),
        all_tokens=sum(value for _, value in totals.of(counters.LAYER_TOKENS)),
        computed=totals.values.get(counters.COMPUTED, 0.0),
        causal=totals.values.get(counters.CAUSAL, 0.0),
    )
