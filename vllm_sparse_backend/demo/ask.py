"""What the demo asks a running server: questions, log probabilities, and what it has counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend.demo.results import Loss
from vllm_sparse_backend.demo.text import ANSWER_TOKENS
from vllm_sparse_backend.errors import SparsePrefillError

if TYPE_CHECKING:
    from openai import OpenAI

    from vllm_sparse_backend.demo.serve import Server

REQUEST_SECONDS = 1800.0  # a dense prefill of a very long prompt on a slow machine


class Unexpected(SparsePrefillError):
    """The server did something that makes the figures worthless; the message says what."""


@dataclass(frozen=True)
class Reply:
    """One streamed, greedy completion."""

    text: str
    ttft_seconds: float  # from sending the request to the first token's arrival
    prompt_tokens: int
    cached_tokens: int  # of these, how many came from the prefix cache


@dataclass(frozen=True)
class Counts:
    """Totals of a server's sparse counters since it started; all 0 where there are none."""

    sparse_layer_tokens: float = 0.0
    computed_tiles: float = 0.0
    causal_tiles: float = 0.0

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(
            self.sparse_layer_tokens - earlier.sparse_layer_tokens,
            self.computed_tiles - earlier.computed_tiles,
            self.causal_tiles - earlier.causal_tiles,
        )


class Asker:
    """Asks one server through the `openai` client, with token ids, greedily."""

    def __init__(self, server: Server) -> None:
        from openai import OpenAI

        self._server = server
        self._model = server.options.served_name
        # No retries: a retried request would meet the prefix cache of its first try.
        self._client: OpenAI = OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_SECONDS,
        )

    def ask(self, prompt: Sequence[int], salt: str = "") -> Reply:
        """Stream the continuation of `prompt`, which shares the prefix cache with those of the
        same `salt` only. Raises what `openai` raises."""
        started = time.perf_counter()
        stream = self._client.completions.create(
            model=self._model,
            prompt=list(prompt),
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache_salt": salt} if salt else None,
        )
        first, pieces, usage = None, [], None
        for chunk in stream:
            if chunk.choices:
                first = first or time.perf_counter()
                pieces.append(chunk.choices[0].text)
            usage = chunk.usage or usage
        if first is None or usage is None:
            raise Unexpected("the server ended its answer without a token or without its usage")
        details = usage.prompt_tokens_details
        return Reply(
            text="".join(pieces),
            ttft_seconds=first - started,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )

    def loss(self, document: Sequence[int]) -> Loss:
        """Negative log likelihood of each token of `document` but the first.

        Requests with prompt log probabilities read nothing from the prefix cache, so this is a
        prefill of its own.
        """
        answer = self._client.completions.create(
            model=self._model,
            prompt=list(document),
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 0},  # of the prompt's own tokens and no others
        )
        entries: list[dict[str, Any] | None] = getattr(answer.choices[0], "prompt_logprobs", [])
        if len(entries) != len(document):
            raise Unexpected(
                f"prompt log probabilities: want {len(document)} entries, got {len(entries)}"
            )
        nats = [
            -float((entry or {})[str(token)]["logprob"])
            for token, entry in zip(document[1:], entries[1:], strict=True)
        ]
        far = nats[len(nats) // 2 :]
        return Loss(
            tokens=len(nats),
            nats=sum(nats),
            second_half_tokens=len(far),
            second_half_nats=sum(far),
        )

    def counts(self) -> Counts:
        """What the server has counted so far."""
        samples = _samples(self._server.metrics())
        return Counts(
            _total(samples, "vllm:sparse_prefill_layer_tokens_total", path="sparse"),
            _total(samples, "vllm:sparse_prefill_tiles_total", kind="computed"),
            _total(samples, "vllm:sparse_prefill_tiles_total", kind="causal"),
        )

    def info(self) -> dict[str, str]:
        """The labels of the sparse backend's info metric; empty if nothing runs sparsely."""
        for name, labels, value in _samples(self._server.metrics()):
            if name == "vllm:sparse_prefill_info" and value:
                return labels
        return {}


Sample = tuple[str, dict[str, str], float]


def _samples(metrics: str) -> list[Sample]:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(metrics)
    return [
        (sample.name, dict(sample.labels), float(sample.value))
        for family in families
        for sample in family.samples
    ]


def _total(samples: list[Sample], name: str, **wanted: str) -> float:
    return sum(
        value
        for found, labels, value in samples
        if found == name and labels.items() >= wanted.items()
    )
