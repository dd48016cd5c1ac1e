"""From the turns of a load test to its figures, their ratios, and the bounds that were crossed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.demo.serve import Side

from .bench import PERCENTILES
from .counters import PREEMPTIONS, Counters, density, total
from .prompts import Prompt
from .run import SIDES, Done, Setup, cached_tokens
from .statistics import (
    Estimate,
    Values,
    common_prefix,
    crossover,
    median_ratio,
    paired_bootstrap,
    ratio_of_percentiles,
)
from .summary import (
    ALL,
    Answers,
    Check,
    Latency,
    LengthRow,
    Metric,
    Percentile,
    Sample,
    Slower,
    Summary,
    Throughput,
    Times,
    TurnRow,
    Wait,
)
from .workload import Bounds, Slo

METRICS: tuple[Metric, ...] = ("ttft", "tpot", "e2e")
SLOWER = 1.05  # a request that takes longer than this much of dense's time is called slower
Chosen = NDArray[np.bool_]  # [requests] or [repetitions, requests]
Tokens = NDArray[np.int64]  # [requests]


class _Side:
    """The turns of one side, as arrays [repetitions, requests]."""

    def __init__(self, done: Sequence[Done]) -> None:
        self.done = sorted(done, key=lambda each: each.turn.repetition)
        ok = self._array(lambda m: [not error for error in m.errors]).astype(bool)
        self.ttft = np.where(ok, self._array(lambda m: m.ttfts), np.nan)
        self.e2e = np.where(ok, self._array(lambda m: m.latencies), np.nan)
        more = self._array(lambda m: m.output_lens) - 1
        # A single token has no time between tokens.
        self.tpot = np.where(more > 0, (self.e2e - self.ttft) / np.maximum(more, 1), np.nan)
        self.sent = self._array(lambda m: m.start_times)
        self.ok = ok

    def _array(self, of: Callable[..., Sequence[float]]) -> Values:
        return np.array([of(each.measured) for each in self.done], dtype=np.float64)

    def of(self, metric: Metric) -> Values:
        return {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}[metric]

    def times(self, number: int) -> Times:
        return Times(
            sent=tuple((self.sent[:, number] - self.sent.min(axis=1)).tolist()),
            ttft=_or_none(self.ttft[:, number]),
            e2e=_or_none(self.e2e[:, number]),
        )

    def texts(self, repetition: int) -> tuple[str, ...]:
        return self.done[repetition].measured.generated_texts


def _or_none(values: Values) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else value for value in values.tolist())


def judge(setup: Setup, done: Sequence[Done], bounds: Bounds, repeat: str) -> Summary:
    """`done`: every turn. `repeat`: the command to show for it."""
    dense, sparse = (_Side([d for d in done if d.turn.side == side]) for side in SIDES)
    workload, prompts = setup.workload, setup.dataset.prompts
    tokens = np.array([prompt.prompt_tokens for prompt in prompts])
    kinds = {ALL: np.ones(len(prompts), dtype=bool)}
    if len(workload.requests) > 1:
        for each in workload.requests:
            kinds[each.name] = np.array([prompt.requests == each.name for prompt in prompts])
    latencies = [
        found
        for name, chosen in kinds.items()
        for metric in METRICS
        if (found := _latency(name, metric, dense, sparse, chosen)) is not None
    ]
    lengths = list(_lengths(tokens, dense, sparse))
    slower = list(_slower(prompts, dense, sparse))
    last = {side.done[0].turn.side: side.done[-1].turn for side in (dense, sparse)}
    counted: Counters = {}
    for turn in sparse.done:
        for name, value in turn.turn.counters.items():
            counted[name] = counted.get(name, 0.0) + value
    summary = Summary(
        made_at=datetime.now(UTC).replace(microsecond=0),
        workload=workload.name,
        about=workload.about,
        model=setup.options.served_name,
        dtype=setup.options.dtype,
        threads=setup.options.threads,
        repeats=len(dense.done),
        repeat=repeat,
        machine=this_machine(),
        info=last["sparse"].info,
        slo=workload.slo,
        latencies=tuple(latencies),
        lengths=tuple(lengths),
        crossover=crossover(
            [row.tokens for row in lengths], [row.ratio.value for row in lengths if row.ratio]
        ),
        wait=_wait(workload.short_tokens, tokens, dense, sparse),
        throughput={
            name: _throughput(side, tokens, workload.slo)
            for name, side in zip(SIDES, (dense, sparse), strict=True)
        },
        answers=_answers(prompts, dense, sparse),
        slower=tuple(slower),
        slower_of=len(prompts),
        density=density(counted),
        checks=(),
        turns=tuple(
            TurnRow(
                side=each.turn.side,
                repetition=each.turn.repetition,
                duration=each.measured.duration,
                startup_seconds=each.turn.startup_seconds,
                other_cores=each.turn.other_cores,
                client_cores=each.turn.client_cores,
                median_ttft=median(each.measured.ttfts),
                counters=each.turn.counters,
            )
            for each in done
        ),
        samples=tuple(
            Sample(
                requests=prompt.requests,
                prompt_tokens=prompt.prompt_tokens,
                output_tokens=prompt.output_tokens,
                times={
                    name: side.times(number)
                    for name, side in zip(SIDES, (dense, sparse), strict=True)
                },
            )
            for number, prompt in enumerate(prompts)
        ),
        commands={side: (turn.server, turn.bench) for side, turn in last.items()},
    )
    return summary.model_copy(update={"checks": tuple(_checks(summary, bounds))})


def _latency(
    name: str, metric: Metric, dense: _Side, sparse: _Side, chosen: Chosen
) -> Latency | None:
    ours, theirs = sparse.of(metric)[:, chosen], dense.of(metric)[:, chosen]
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    if not both.any():
        return None
    return Latency(
        requests=name,
        metric=metric,
        pairs=int(both.sum()),
        percentiles=tuple(
            Percentile(
                percent=percent,
                dense=float(np.percentile(theirs[both], percent)),
                sparse=float(np.percentile(ours[both], percent)),
                ratio=paired_bootstrap(theirs, ours, ratio_of_percentiles(percent)),
            )
            for percent in PERCENTILES
        ),
        pair_ratio=paired_bootstrap(theirs, ours, median_ratio),
    )


def _lengths(tokens: Tokens, dense: _Side, sparse: _Side) -> Iterator[LengthRow]:
    octaves = np.round(np.log2(tokens)).astype(int)
    for octave in sorted(set(octaves.tolist())):
        chosen = octaves == octave
        ours, theirs = sparse.ttft[:, chosen], dense.ttft[:, chosen]
        both = ~np.isnan(ours) & ~np.isnan(theirs)
        if both.any():
            yield LengthRow(
                tokens=float(np.median(tokens[chosen])),
                pairs=int(both.sum()),
                dense=float(np.median(theirs[both])),
                sparse=float(np.median(ours[both])),
                ratio=paired_bootstrap(theirs, ours, median_ratio),
            )


def _wait(short_tokens: int, tokens: Tokens, dense: _Side, sparse: _Side) -> Wait | None:
    short = tokens <= short_tokens
    ours, theirs = sparse.ttft[:, short], dense.ttft[:, short]
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    if not both.any():
        return None
    behind = both & behind_longer(dense.sent, dense.ttft, short)[:, short]
    shown = (50, *(p for p in PERCENTILES if p > 50), 100)
    return Wait(
        short_tokens=short_tokens,
        pairs=int(both.sum()),
        behind=int(behind.sum()),
        dense={p: float(np.percentile(theirs[both], p)) for p in shown},
        sparse={p: float(np.percentile(ours[both], p)) for p in shown},
        p99_ratio=paired_bootstrap(theirs, ours, ratio_of_percentiles(99)),
        behind_ratio=paired_bootstrap(
            np.where(behind, theirs, np.nan), np.where(behind, ours, np.nan), median_ratio
        ),
        probe={
            side.done[0].turn.side: probe
            for side in (dense, sparse)
            if (probe := _probe(side)) is not None
        },
    )


def behind_longer(sent: Values, ttft: Values, short: Chosen) -> Chosen:
    """Which requests were sent while some prompt that is not short waited for its first token.

    `sent`, `ttft`: [R, N] seconds; `short`: [N] bool. Gives [R, N] bool.
    """
    first = (sent + ttft)[:, None, ~short]
    now = sent[:, :, None]
    waiting = (sent[:, None, ~short] < now) & (now < first)
    found: Chosen = np.any(waiting, axis=-1)
    return found


def _probe(side: _Side) -> tuple[float, float, float] | None:
    of = [each.measured for each in side.done if each.measured.probe_median_e2el_ms is not None]
    if not of:
        return None
    return (
        median(m.probe_median_e2el_ms or math.nan for m in of) / 1000,
        median(m.probe_p99_e2el_ms or math.nan for m in of) / 1000,
        max(m.probe_max_e2el_ms or math.nan for m in of) / 1000,
    )


def _throughput(side: _Side, tokens: Tokens, slo: Slo) -> Throughput:
    limits = np.array([slo.ttft_limit(int(each)) for each in tokens])
    within = np.less_equal(side.ttft, limits)
    if slo.tpot_seconds is not None:  # a single token has no TPOT, and is within
        within = within & ~np.greater(side.tpot, slo.tpot_seconds)
    seconds = np.array([each.measured.duration for each in side.done])
    last = side.sent.max(axis=1)
    ends = np.nanmax(side.sent + np.nan_to_num(side.e2e), axis=1)
    turns = [each.turn for each in side.done]
    return Throughput(
        requests_per_second=float(np.mean(side.ok.sum(axis=1) / seconds)),
        tokens_per_second=fmean(each.measured.total_token_throughput for each in side.done),
        good_per_second=float(np.mean(within.sum(axis=1) / seconds)),
        good_share=float(within.mean()),
        drain_seconds=float(np.mean(ends - last)),
        failed=int((~side.ok).sum()),
        cached_tokens=fmean(map(cached_tokens, turns)),
        preemptions=fmean(total(turn.counters, PREEMPTIONS) for turn in turns),
    )


def _answers(prompts: Sequence[Prompt], dense: _Side, sparse: _Side) -> Answers:
    same, prefix, lost = [], [], []
    right: dict[Side, int] = {"dense": 0, "sparse": 0}
    asked = 0
    for repetition in range(len(dense.done)):
        texts = zip(dense.texts(repetition), sparse.texts(repetition), strict=True)
        for number, (prompt, (theirs, ours)) in enumerate(zip(prompts, texts, strict=True)):
            if not (dense.ok[repetition, number] and sparse.ok[repetition, number]):
                continue
            same.append(theirs == ours)
            prefix.append(common_prefix(theirs, ours))
            if prompt.answer is not None:
                asked += 1
                good = {"dense": bool(prompt.right(theirs)), "sparse": bool(prompt.right(ours))}
                right["dense"] += good["dense"]
                right["sparse"] += good["sparse"]
                if good["dense"] and not good["sparse"]:
                    lost.append(
                        f"repetition {repetition + 1}, request {number} ({prompt.requests}, "
                        f"{prompt.prompt_tokens} tokens): dense answered {prompt.answer}, sparse "
                        f"{' '.join(ours.split())[:40]!r}"
                    )
    again = [
        one == other
        for repetition in range(1, len(dense.done))
        for one, other in zip(dense.texts(0), dense.texts(repetition), strict=True)
    ]
    return Answers(
        pairs=len(same),
        same=fmean(same) if same else None,
        prefix=fmean(prefix) if prefix else None,
        dense_again=fmean(again) if again else None,
        asked=asked,
        right=right,
        lost=tuple(lost),
    )


def _slower(prompts: Sequence[Prompt], dense: _Side, sparse: _Side) -> Iterator[Slower]:
    for number, prompt in enumerate(prompts):
        theirs, ours = dense.e2e[:, number], sparse.e2e[:, number]
        both = ~np.isnan(theirs) & ~np.isnan(ours)
        if both.any() and np.median(ours[both] / theirs[both]) > SLOWER:
            yield Slower(
                number=number,
                requests=prompt.requests,
                prompt_tokens=prompt.prompt_tokens,
                dense=float(np.median(theirs[both])),
                sparse=float(np.median(ours[both])),
            )


def _checks(summary: Summary, bounds: Bounds) -> Iterator[Check]:
    """A bound that cannot be judged is crossed: a load test that saw nothing is no success."""

    def check(
        name: str, limit: float | None, value: float | None, at_least: bool
    ) -> Iterator[Check]:
        if limit is not None:
            kept = value is not None and (value >= limit if at_least else value <= limit)
            yield Check(name=name, limit=limit, value=value, crossed=not kept)

    ttft = summary.latency(ALL, "ttft")
    middle = next((p.ratio for p in ttft.percentiles if p.percent == 50), None) if ttft else None
    worst = [
        latency.pair_ratio.value
        for latency in summary.latencies
        if latency.metric == "e2e" and latency.pair_ratio is not None
    ]
    wait = summary.wait.p99_ratio if summary.wait else None
    tokens = {side: each.tokens_per_second for side, each in summary.throughput.items()}
    yield from check("max_ttft_ratio", bounds.max_ttft_ratio, _value(middle), False)
    yield from check("max_short_wait_ratio", bounds.max_short_wait_ratio, _value(wait), False)
    yield from check("max_request_ratio", bounds.max_request_ratio, max(worst, default=None), False)
    yield from check(
        "min_throughput_ratio",
        bounds.min_throughput_ratio,
        tokens["sparse"] / tokens["dense"] if tokens["dense"] else None,
        True,
    )
    yield from check(
        "max_lost_answers", bounds.max_lost_answers, float(len(summary.answers.lost)), False
    )


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
