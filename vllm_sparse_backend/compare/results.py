"""What a comparison found, as written beside the page and read by nobody but people's scripts.

Times are shares of dense attention's, taken in the same rounds: what else ran on the machine then
slowed both. Seconds are theirs times the median of all of dense attention's.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.demo.machine import Machine
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import Policy

SCHEMA = 1  # goes up when a field changes its meaning or goes away


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Point(_Record):
    """A setting at one length: of layers, means of the figures and sums of the times."""

    setting: str  # for people
    policy: Policy | None  # of every head; None: of a profile
    length: int
    error: float  # relative L1 of a layer's output against exact dense attention
    tail: float  # mean of the worst 1% of the rows
    recall: float  # softmax mass of the computed tiles
    worst_recall: float  # of the 1% of the rows that have least
    density: float  # computed / causal keys
    time: float  # whole, over dense attention's
    select: float  # of `time`, choosing tiles
    spread: float  # between repetitions, (most - least) / median of the time
    seconds: float
    select_seconds: float

    @property
    def at(self) -> tuple[float, float]:
        """Error and time."""
        return self.error, self.time


class Perplexity(_Record):
    """A setting end to end, every head of every layer: one task at one length."""

    setting: str
    task: str
    length: int
    tokens: int  # whose loss counts
    dense: float
    sparse: float
    change_percent: float
    error_percent: float | None  # standard error over documents; None of a single one
    density: float | None  # None: nothing was sparse


class MethodResult(_Record):
    """A method's points, by ascending length and along its ladder."""

    name: str
    what: str
    listed: bool
    own: bool
    points: list[Point]
    perplexities: list[Perplexity] = []

    @property
    def profile(self) -> bool:
        """Whether every head has a policy of its own."""
        return any(point.policy is None for point in self.points)

    def of_length(self, length: int) -> list[Point]:
        """Those of one length."""
        return [point for point in self.points if point.length == length]


class Comparison(_Record):
    """A whole run."""

    comparison_schema: int = SCHEMA
    made_at: datetime
    model: str
    facts: ModelFacts
    layers: list[int]  # that were measured
    sparse_layers: list[int]  # that there are
    dtype: str
    isa: str
    threads: int
    machine: Machine
    chunk_tokens: int
    hf_overrides: dict[str, Any] | None
    texts: list[str]
    seed: int
    repeats: int
    blocks: int
    lengths: list[int]  # ascending
    errors: list[float]  # to be reached, ascending
    dense: str  # what dense attention was
    dense_seconds: dict[int, float]  # by length, of the measured layers
    default: str  # the uniform default, among the settings of `default_method`
    default_method: str
    methods: list[MethodResult]
    left_out: dict[str, str]  # methods, and why
    repeat: str  # the command
    disturbed: list[str] = []  # measurements that something else on the machine had a part in

    def method(self, name: str) -> MethodResult:
        """By name."""
        return next(its for its in self.methods if its.name == name)

    def point(self, setting: str, length: int) -> Point | None:
        """A setting's at one length."""
        every = (point for method in self.methods for point in method.of_length(length))
        return next((point for point in every if point.setting == setting), None)
