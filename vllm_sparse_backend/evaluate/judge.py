"""Two sides' readings of the same documents become the records of one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from statistics import fmean

from vllm_sparse_backend.evaluate.readings import Reading
from vllm_sparse_backend.evaluate.results import (
    Agreement,
    Answer,
    Bucket,
    Cell,
    Continuation,
    DocumentLoss,
    Interval,
    Likelihood,
    Retrieval,
    Row,
)
from vllm_sparse_backend.evaluate.statistics import exp, mean_interval, perplexity, wilson
from vllm_sparse_backend.tasks.catalog import Batch
from vllm_sparse_backend.tasks.items import Item

BUCKETS = 8
WORST = 0.01  # share of the tokens

Losses = Sequence[Sequence[float]]  # nats, by document and token


def judge(batch: Batch, length: int, dense: Sequence[Reading], sparse: Sequence[Reading]) -> Row:
    """The row of `batch`. Both sides have a reading of each of its items, in their order."""
    counts = [reading.counts for reading in sparse]
    causal = sum(count.causal for count in counts)
    everything = sum(count.all_tokens for count in counts)
    scored = batch.items[0].scored
    return Row(
        task=batch.task,
        text=batch.text,
        length=length,
        documents=len(batch.items),
        retrieval=None if scored is not None else retrieval(batch.items, dense, sparse),
        likelihood=None
        if scored is None
        else likelihood([r.losses for r in dense], [r.losses for r in sparse], scored),
        agreement=None
        if scored is None
        else agreement([r.continuation for r in dense], [r.continuation for r in sparse]),
        density=sum(count.computed for count in counts) / causal if causal else None,
        sparse_share=sum(count.sparse_tokens for count in counts) / everything
        if everything
        else 0.0,
        dense_ttft=tuple(reading.ttft for reading in dense if reading.ttft is not None),
        sparse_ttft=tuple(reading.ttft for reading in sparse if reading.ttft is not None),
    )


def retrieval(
    items: Sequence[Item], dense: Sequence[Reading], sparse: Sequence[Reading]
) -> Retrieval:
    """Who was right about what."""
    answers = [
        Answer(
            document=number,
            name=question.name,
            expected=question.expected,
            depth=question.depth,
            cold=question is item.questions[0],
            dense=its,
            sparse=ours,
            dense_right=question.right(its),
            sparse_right=question.right(ours),
        )
        for number, (item, one, other) in enumerate(zip(items, dense, sparse, strict=True))
        for question, its, ours in zip(item.questions, one.answers, other.answers, strict=True)
    ]
    right = sum(answer.dense_right for answer in answers)
    both = sum(answer.dense_right and answer.sparse_right for answer in answers)
    found = sum(answer.sparse_right for answer in answers)
    return Retrieval(
        asked=len(answers),
        dense_right=right,
        sparse_right=found,
        both=both,
        lost=right - both,
        gained=found - both,
        retained=both / right if right else None,
        retained_interval=_interval(wilson(both, right)),
        depths=tuple(
            _cell(depth, [answer for answer in answers if answer.depth == depth])
            for depth in sorted({answer.depth for answer in answers})
        ),
        answers=tuple(answers),
    )


def likelihood(dense: Losses, sparse: Losses, first: int) -> Likelihood:
    """Of the same tokens, from position `first` of each document on."""
    growth = [
        [ours - its for its, ours in zip(one, other, strict=True)]
        for one, other in zip(dense, sparse, strict=True)
    ]
    every = list(chain.from_iterable(growth))
    mean = fmean(every)
    # Of the logarithm of the perplexities' ratio; the ends go through the exponential.
    spread = mean_interval([fmean(document) for document in growth])
    worst = sorted(every, reverse=True)[: math.ceil(WORST * len(every))]
    return Likelihood(
        tokens=len(every),
        dense_perplexity=perplexity(list(chain.from_iterable(dense))),
        sparse_perplexity=perplexity(list(chain.from_iterable(sparse))),
        change_percent=_percent(mean),
        error_percent=100 * exp(mean) * spread[0] if spread else None,
        change_interval=Interval(low=_percent(mean - spread[1]), high=_percent(mean + spread[1]))
        if spread
        else None,
        worst_nats=fmean(worst),
        documents=tuple(
            DocumentLoss(document=n, tokens=len(its), dense_nats=sum(its), sparse_nats=sum(ours))
            for n, (its, ours) in enumerate(zip(dense, sparse, strict=True))
        ),
        buckets=tuple(_buckets(dense, sparse, first)),
    )


def agreement(dense: Sequence[Sequence[int]], sparse: Sequence[Sequence[int]]) -> Agreement:
    """How far two greedy continuations of the same text go together."""
    documents = [
        Continuation(document=n, tokens=len(its), agreed=_common(its, ours))
        for n, (its, ours) in enumerate(zip(dense, sparse, strict=True))
    ]
    tokens = sum(document.tokens for document in documents)
    return Agreement(
        continuations=len(documents),
        identical=sum(document.agreed == document.tokens for document in documents),
        agreed_share=sum(document.agreed for document in documents) / tokens if tokens else 1.0,
        documents=tuple(documents),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return place
    return len(one)


def _buckets(dense: Losses, sparse: Losses, first: int) -> list[Bucket]:
    length = len(dense[0])
    edges = sorted({length * n // BUCKETS for n in range(BUCKETS + 1)})
    return [
        Bucket(
            first=first + start,
            last=first + end - 1,
            tokens=(end - start) * len(dense),
            dense_perplexity=perplexity([x for document in dense for x in document[start:end]]),
            sparse_perplexity=perplexity([x for document in sparse for x in document[start:end]]),
        )
        for start, end in pairwise(edges)
    ]


def _cell(depth: float, answers: Sequence[Answer]) -> Cell:
    return Cell(
        depth=depth,
        asked=len(answers),
        dense_right=sum(answer.dense_right for answer in answers),
        sparse_right=sum(answer.sparse_right for answer in answers),
    )


def _percent(nats: float) -> float:
    return 100 * (exp(nats) - 1)


def _interval(ends: tuple[float, float] | None) -> Interval | None:
    return None if ends is None else Interval(low=ends[0], high=ends[1])
