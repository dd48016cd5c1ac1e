"""What an evaluation measured, as written to eval.json and read by the report.

Every figure is a field, made once by `judge.py`, so that a reader of the JSON computes nothing.
"Dense" is the attention that vLLM chooses by itself, "sparse" the backend under test, always on
the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.demo.machine import Machine
from vllm_sparse_backend.files import write_whole
from vllm_sparse_backend.profile import ModelFacts

SCHEMA = 1  # goes up when a field changes its meaning or goes away
PERPLEXITY_LOSS = 1.0  # percent: a rise of more than this is called a loss


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Interval(_Record):
    """A 95% confidence interval, in the unit of what it belongs to."""

    low: float
    high: float


class Answer(_Record):
    """What both sides said to one question."""

    document: int  # of its row, from 0
    name: str  # what was asked for
    expected: str
    depth: float  # 0..1, where in the context the answer stands
    cold: bool  # the document's first question, a prefill of all of it; the others are behind it
    dense: str
    sparse: str
    dense_right: bool
    sparse_right: bool


class Cell(_Record):
    """All answers of a row at one depth."""

    depth: float
    asked: int
    dense_right: int
    sparse_right: int


class Retrieval(_Record):
    """Questions with one right answer."""

    asked: int
    dense_right: int
    sparse_right: int
    both: int  # right on both sides
    lost: int  # dense right, sparse wrong
    gained: int  # dense wrong, sparse right
    retained: float | None  # both / dense_right; None where dense had nothing right
    retained_interval: Interval | None  # Wilson's; questions of one document are not independent
    depths: tuple[Cell, ...]  # ascending
    answers: tuple[Answer, ...]


class DocumentLoss(_Record):
    """Negative log likelihood (nats) of a document's scored tokens, summed."""

    document: int
    tokens: int
    dense_nats: float
    sparse_nats: float


class Bucket(_Record):
    """The scored tokens at positions `first` to `last` (inclusive) of all documents of a row."""

    first: int
    last: int
    tokens: int
    dense_perplexity: float
    sparse_perplexity: float


class Likelihood(_Record):
    """How well text is predicted, token by token on both sides."""

    tokens: int
    dense_perplexity: float
    sparse_perplexity: float
    change_percent: float  # of the perplexity, from dense to sparse; positive is worse
    error_percent: float | None  # standard error of that over documents; None for a single one
    change_interval: Interval | None  # percent, by Student's t over documents; None likewise
    worst_nats: float  # mean growth of the loss over the 1% of the tokens that it grew most on
    documents: tuple[DocumentLoss, ...]
    buckets: tuple[Bucket, ...]  # ascending positions


class Continuation(_Record):
    """What both sides generated, greedily, behind the same text."""

    document: int
    tokens: int  # generated on each side
    agreed: int  # before the first that differs


class Agreement(_Record):
    """Greedy continuations of text: the strictest view, as one near-tie ends an agreement."""

    continuations: int
    identical: int
    agreed_share: float  # tokens before the first that differs, of all tokens generated
    documents: tuple[Continuation, ...]


class Row(_Record):
    """One task at one length: the same documents in the same order on both sides."""

    task: str
    text: str  # what the documents are made of: "code", "docs", ...; "" where it is no text
    length: int  # tokens of a prompt with its answer, at most
    documents: int
    retrieval: Retrieval | None = None
    likelihood: Likelihood | None = None
    agreement: Agreement | None = None
    density: float | None  # tiles computed / causal; None where nothing was sparse
    sparse_share: float  # of the sparse side's tokens x layers, those computed sparsely
    dense_ttft: tuple[float, ...] = ()  # seconds to the first token of each cold prompt that was
    sparse_ttft: tuple[float, ...] = ()  # a question; empty for tasks that ask none

    @property
    def dense_ttft_median(self) -> float | None:
        """Seconds."""
        return median(self.dense_ttft) if self.dense_ttft else None

    @property
    def sparse_ttft_median(self) -> float | None:
        """Seconds."""
        return median(self.sparse_ttft) if self.sparse_ttft else None

    @property
    def name(self) -> str:
        """ "needles, 4096 tokens" or "text (code), 4096 tokens"."""
        text = f" ({self.text})" if self.text else ""
        return f"{self.task}{text}, {self.length} tokens"


class Evaluation(_Record):
    """A whole run."""

    evaluation_schema: int = SCHEMA
    made_at: datetime
    model: str
    facts: ModelFacts | None
    dtype: str
    threads: int
    chunk_tokens: int
    hf_overrides: dict[str, Any] | None
    machine: Machine
    isa: str
    profile: str  # its name; "uniform" where every head has the same policy
    profile_digest: str  # "" without a profile
    policies: str  # what the heads follow, in a few words
    sparse_config: dict[str, Any]  # the section sparse_prefill, what differs from the defaults
    texts: tuple[str, ...]  # what was read, by name
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    seed: int
    repeat: str  # the command that made this
    rows: tuple[Row, ...]
    dense_kept: int = 0  # documents whose dense side is of an earlier run
    dense_times_kept: int = 0  # of these, those that were timed: same machine, as many threads
    seconds: float  # the whole run

    def dense_times(self) -> str:
        """What is to be said beside a ratio of times; "" where both sides are of this run."""
        if not self.dense_times_kept:
            return ""
        every = sum(len(row.dense_ttft) for row in self.rows)
        return f"{self.dense_times_kept} of {every} dense times are of an earlier run"

    def losses(self) -> list[str]:
        """What sparse prefill lost against dense, one line each; empty if nothing."""
        return [line for row in self.rows for line in _losses(row)]

    def warnings(self) -> list[str]:
        """Rows that say nothing about sparse attention, one line each."""
        return [
            f"{row.name}: nothing of it was computed sparsely"
            for row in self.rows
            if row.density is None
        ]

    def grid(self, task: str) -> list[tuple[int, Cell]]:
        """Length and cell of a retrieval task, by length and then depth."""
        rows = sorted((row for row in self.rows if row.task == task), key=lambda row: row.length)
        return [
            (row.length, cell) for row in rows if row.retrieval for cell in row.retrieval.depths
        ]

    def save(self, path: Path) -> None:
        """Write eval.json, whole or not at all. Raises SparsePrefillError."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")


def load_evaluation(path: Path) -> Evaluation:
    """What `Evaluation.save` wrote. Raises OSError, and ValidationError for another file."""
    return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))


def _losses(row: Row) -> Iterator[str]:
    if row.retrieval is not None:
        for answer in row.retrieval.answers:
            if answer.dense_right and not answer.sparse_right:
                yield (
                    f"{row.name}: dense found the {answer.name}, {answer.expected}, "
                    f"sparse answered {answer.sparse.strip()!r}"
                )
    if row.likelihood is not None:
        change = row.likelihood.change_percent
        # Not a number is a loss too, and compares as false either way.
        if not change <= PERPLEXITY_LOSS:
            yield f"{row.name}: perplexity rose by {change:.2f}% (more than {PERPLEXITY_LOSS:g}%)"
