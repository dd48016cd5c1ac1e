"""What the demo measured, as written to results.json and shown by the report."""

from __future__ import annotations

import math
from datetime import datetime
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.demo.machine import Machine
from vllm_sparse_backend.demo.serve import Side

SCHEMA = 1  # goes up when a field changes its meaning or goes away
DISTURBED = 0.15  # cores used by others; a sleeping desktop uses fewer
PERPLEXITY_LOSS = 0.01  # a relative rise of more than this is called a loss


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Record):
    """What one side said to one needle question."""

    name: str
    expected: str
    depth: float  # 0..1, where in the document the needle is
    text: str
    right: bool


class Loss(_Record):
    """Negative log likelihoods (nats) of a document's tokens but the first, summed; of those in its
    second half, too, which see the longer context."""

    tokens: int
    nats: float
    second_half_tokens: int
    second_half_nats: float

    @property
    def perplexity(self) -> float:
        """Over all the tokens."""
        return math.exp(self.nats / self.tokens)


class DocumentRun(_Record):
    """One document on one side: the first question on a cold cache, the others behind it."""

    seed: int
    prompt_tokens: int
    ttft_seconds: float  # of the first question; nothing of it was in the prefix cache
    answers: tuple[Answer, ...]
    other_cores: float = 0.0  # cores that other programs used on average until that first token
    # Of that first question, from the server's counters. Zero on the dense side.
    sparse_layer_tokens: float = 0.0
    computed_tiles: float = 0.0
    causal_tiles: float = 0.0
    loss: Loss | None = None  # None where perplexity was not asked for


class SideRow(_Record):
    """Every document of one length on one side."""

    documents: tuple[DocumentRun, ...]

    @property
    def ttft_seconds(self) -> float:
        """Median over the documents."""
        return median(document.ttft_seconds for document in self.documents)

    @property
    def perplexity(self) -> float | None:
        """Over all tokens of the documents it was asked for."""
        losses = [document.loss for document in self.documents if document.loss is not None]
        tokens = sum(loss.tokens for loss in losses)
        return math.exp(sum(loss.nats for loss in losses) / tokens) if tokens else None

    @property
    def second_half_perplexity(self) -> float | None:
        """The same over the second half of each document, which has the longer context."""
        losses = [document.loss for document in self.documents if document.loss is not None]
        tokens = sum(loss.second_half_tokens for loss in losses)
        return math.exp(sum(loss.second_half_nats for loss in losses) / tokens) if tokens else None

    @property
    def answers(self) -> list[Answer]:
        """Of all documents, in the order they were asked."""
        return [answer for document in self.documents for answer in document.answers]

    @property
    def right(self) -> int:
        """How many needles were found."""
        return sum(answer.right for answer in self.answers)


class Row(_Record):
    """One length, both sides, the same documents in the same order."""

    length: int  # tokens of the longest question and its answer; a little more than the document
    scaled: bool  # served with RoPE scaling
    sparse_expected: bool  # false: below the sparse threshold, dense on both sides
    dense: SideRow
    sparse: SideRow

    @property
    def prompt_tokens(self) -> int:
        """Of the measured question, median over the documents (they differ by a token or two)."""
        return int(median(document.prompt_tokens for document in self.dense.documents))

    @property
    def speedup(self) -> float:
        """Dense TTFT over sparse TTFT."""
        return self.dense.ttft_seconds / self.sparse.ttft_seconds

    @property
    def density(self) -> float | None:
        """Tiles computed over causal tiles, over all documents; None where all of it was dense."""
        causal = sum(document.causal_tiles for document in self.sparse.documents)
        computed = sum(document.computed_tiles for document in self.sparse.documents)
        return computed / causal if causal else None

    @property
    def perplexity_change(self) -> float | None:
        """Relative change from dense to sparse; positive is worse."""
        dense, sparse = self.dense.perplexity, self.sparse.perplexity
        return None if dense is None or sparse is None else sparse / dense - 1

    @property
    def lost(self) -> list[tuple[Answer, Answer]]:
        """Needles that dense found and sparse did not."""
        pairs = zip(self.dense.answers, self.sparse.answers, strict=True)
        return [(dense, sparse) for dense, sparse in pairs if dense.right and not sparse.right]


class ServerRun(_Record):
    """One server that was started, and how to start it again."""

    side: Side
    lengths: tuple[int, ...]
    startup_seconds: float
    command: str


class Results(_Record):
    """A whole run."""

    results_schema: int = SCHEMA
    made_at: datetime
    model: str
    threads: int
    dtype: str = "bfloat16"
    chunk_tokens: int
    repeat: str  # the command that made this
    machine: Machine
    sparse_config: dict[str, Any]
    sparse_info: dict[str, str]  # what the sparse server said it ran: ISA, profile, digest
    rows: tuple[Row, ...]
    servers: tuple[ServerRun, ...]
    seconds: float  # the whole demo

    def losses(self) -> list[str]:
        """What sparse prefill lost against dense, one line each; empty if nothing."""
        lines = []
        for row in self.rows:
            lines += [
                f"{row.length} tokens: dense found the {dense.name} {dense.expected}, "
                f"sparse answered {sparse.text.strip()!r}"
                for dense, sparse in row.lost
            ]
            change = row.perplexity_change
            # Not a number is a loss too, and compares as false either way.
            if change is not None and not change <= PERPLEXITY_LOSS:
                lines.append(
                    f"{row.length} tokens: perplexity rose by {change:.2%} "
                    f"(more than {PERPLEXITY_LOSS:.0%})"
                )
        return lines

    def disturbances(self) -> list[str]:
        """Measurements that shared the machine, one line each; their times mean little."""
        return [
            f"{row.length} tokens, {name}: other programs used {others:.1f} cores meanwhile"
            for row in self.rows
            for name, side in (("dense", row.dense), ("sparse", row.sparse))
            if (others := max(document.other_cores for document in side.documents)) > DISTURBED
        ]

    def headline(self) -> str:
        """The result in one sentence."""
        best = max(self.rows, key=lambda row: row.length)
        text = (
            f"First token of {best.prompt_tokens:,} prompt tokens after "
            f"{best.sparse.ttft_seconds:.1f} s instead of {best.dense.ttft_seconds:.1f} s: "
            f"{best.speedup:.1f} times as fast"
        )
        return f"{text}." if self.losses() else f"{text}, and nothing is lost."
