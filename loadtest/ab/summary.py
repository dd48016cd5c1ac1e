"""What a load test found, as written to results.json and shown by the report."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.demo.machine import Machine
from vllm_sparse_backend.demo.serve import Side

from .counters import Counters
from .statistics import Estimate
from .workload import Slo

SCHEMA = 1  # goes up when a field changes its meaning or goes away
ALL = "all"
DISTURBED = 0.15  # cores used by others
Metric = Literal["ttft", "tpot", "e2e"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Percentile(_Record):
    """Seconds of both sides, and sparse / dense."""

    percent: int
    dense: float
    sparse: float
    ratio: Estimate | None


class Latency(_Record):
    """One metric of one kind of requests ("all": of every one)."""

    requests: str
    metric: Metric
    pairs: int  # over all repetitions
    percentiles: tuple[Percentile, ...]
    pair_ratio: Estimate | None  # median over pairs of sparse / dense


class LengthRow(_Record):
    """TTFT of the prompts within a factor of two of each other, in seconds; medians."""

    tokens: float
    pairs: int
    dense: float
    sparse: float
    ratio: Estimate | None  # median over pairs


class Wait(_Record):
    """How long short requests wait for their first token, in seconds."""

    short_tokens: int
    pairs: int
    behind: int  # of them, sent while a longer prompt waited for its first token on the dense side
    dense: dict[int, float]  # by percentile; 100: the longest
    sparse: dict[int, float]
    p99_ratio: Estimate | None
    behind_ratio: Estimate | None  # median over pairs of those behind
    probe: dict[Side, tuple[float, float, float]]  # median, p99, max of the tool's own probes


class Throughput(_Record):
    """Means over repetitions."""

    requests_per_second: float
    tokens_per_second: float  # in and out
    good_per_second: float  # requests within the SLO
    good_share: float
    drain_seconds: float  # from the last request's arrival to the last answer's end
    failed: int  # requests, in all
    cached_tokens: float
    preemptions: float


class Answers(_Record):
    """Generated texts, greedy, of both sides and of dense in two repetitions."""

    pairs: int
    same: float | None  # share that is the same to the last character
    prefix: float | None  # mean share that is the same from the beginning on
    dense_again: float | None  # the first share between two repetitions of dense: its own noise
    asked: int  # requests with a known answer, over all repetitions
    right: dict[Side, int]
    lost: tuple[str, ...]  # answers that dense gave and sparse did not


class Slower(_Record):
    """A request whose end-to-end time, at the median over repetitions, is more than 5% longer."""

    number: int
    requests: str
    prompt_tokens: int
    dense: float  # seconds, medians
    sparse: float


class Check(_Record):
    """A bound that was stated."""

    name: str
    limit: float
    value: float | None
    crossed: bool


class Times(_Record):
    """One side of a request: seconds in each repetition, None where it failed."""

    sent: tuple[float, ...]  # after the first of the repetition
    ttft: tuple[float | None, ...]
    e2e: tuple[float | None, ...]


class Sample(_Record):
    """One request, in the order of sending."""

    requests: str
    prompt_tokens: int
    output_tokens: int
    times: dict[Side, Times]


class TurnRow(_Record):
    """One turn, in short."""

    side: Side
    repetition: int
    duration: float
    startup_seconds: float
    other_cores: float
    client_cores: float
    median_ttft: float
    counters: Counters


class Summary(_Record):
    """A whole load test, as written to results.json."""

    results_schema: int = SCHEMA
    made_at: datetime
    workload: str
    about: str
    model: str
    dtype: str
    threads: int
    repeats: int
    repeat: str  # the command that made this
    machine: Machine
    info: dict[str, str]
    slo: Slo
    latencies: tuple[Latency, ...]
    lengths: tuple[LengthRow, ...]
    crossover: float | None  # tokens; 0: sparse is faster at all lengths; None: at none
    wait: Wait | None  # None: no short request
    throughput: dict[Side, Throughput]
    answers: Answers
    slower: tuple[Slower, ...]
    slower_of: int
    density: float | None
    checks: tuple[Check, ...]
    turns: tuple[TurnRow, ...]
    samples: tuple[Sample, ...]
    commands: dict[Side, tuple[str, str]]  # the server's and the tool's

    @property
    def failed(self) -> int:
        """Requests without an answer, on both sides."""
        return sum(each.failed for each in self.throughput.values())

    @property
    def crossed(self) -> list[Check]:
        """The bounds that sparse did not keep to."""
        return [check for check in self.checks if check.crossed]

    def latency(self, requests: str, metric: Metric) -> Latency | None:
        """Of one kind of requests."""
        wanted = (requests, metric)
        return next((x for x in self.latencies if (x.requests, x.metric) == wanted), None)

    def headline(self) -> str:
        """The result in one sentence."""
        ttft = self.latency(ALL, "ttft")
        if ttft is None:
            return "No request was answered on both sides."
        middle = next(each for each in ttft.percentiles if each.percent == 50)
        text = (
            f"First token after {middle.sparse:.2f} s instead of {middle.dense:.2f} s at the median"
        )
        if self.wait is not None:
            text += (
                f"; of 100 short requests all but one wait at most {self.wait.sparse[99]:.2f} s "
                f"instead of {self.wait.dense[99]:.2f} s"
            )
        return f"{text}."

    def disturbances(self) -> list[str]:
        """Turns that shared the machine, a line each; their times mean little."""
        return [
            f"repetition {turn.repetition}, {turn.side}: other programs used "
            f"{turn.other_cores:.1f} cores meanwhile"
            for turn in self.turns
            if turn.other_cores > DISTURBED
        ]
