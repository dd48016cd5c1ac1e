"""What a calibration measured, as written beside the profile and read by the report."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import Policy

PARTS, MEASUREMENT = ".parts", ".measurement.json"  # beside a profile, instead of its .json
SCHEMA = 1  # goes up when a field changes its meaning or goes away


def parts_of(profile: Path) -> Path:
    """The folder of what a calibration measured, a file for each document."""
    return profile.with_suffix(PARTS)


def measurement_of(profile: Path) -> Path:
    """Where a profile's measurement is."""
    return profile.with_suffix(MEASUREMENT)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figures(_Record):
    """Of one head, or the mean of several, against dense attention.

    Density is the mean over the kinds of text; the others are those of the worst kind.
    """

    density: float  # computed / causal keys
    error: float  # relative L1 of the output
    tail: float  # the same of the worst 1% of the rows
    recall: float  # mean softmax mass of the kept tiles


class HeadResult(_Record):
    """What was chosen for a head, and what that does at each length."""

    layer: int
    head: int
    policy: Policy
    figures: dict[int, Figures]  # by tokens of a document


class Point(_Record):
    """Every head under one threshold."""

    tau: float
    figures: Figures  # means over heads


class Curve(_Record):
    """What one selector does at one length, threshold by threshold, ascending."""

    selector: str  # and which rows it scores, where not as by default
    length: int
    points: list[Point]


class Predicted(_Record):
    """Seconds for the attention of a whole prompt, by the cost model: of one thread, or of a GPU,
    where they are the worse end of a range."""

    base: float  # dense attention
    keep_all: float
    sparse: float
    sparse_best: float | None = None  # the better end

    def speedup(self) -> str:
        """Of dense attention's time."""
        worse, better = (self.base / its for its in (self.sparse, self.sparse_best or self.sparse))
        return f"{worse:.1f}" if self.sparse_best is None else f"{worse:.1f} to {better:.1f}"


class Measurement(_Record):
    """A whole calibration."""

    measurement_schema: int = SCHEMA
    name: str  # the profile's
    digest: str  # the profile's, so that a report never mixes two
    model: ModelFacts
    texts: list[str]
    kinds: list[str] = []  # of documents made of them
    lengths: list[int]
    chunk_tokens: int
    rule: str
    budget: float
    seed: int
    isa: str  # whose costs decided: an instruction set, or a GPU's architecture
    base: str = "CPU_ATTN"  # dense attention there
    whose: str = ""  # the predicted seconds are, and how they are known
    dtype: str
    sparse_layers: list[int]  # the layers that can be sparse
    heads: list[HeadResult]  # of those layers, all of them
    curves: list[Curve]
    predicted: dict[int, Predicted]  # by length
    # Of the prediction from the exact model's, as rule loss predicts it: nats a token, by length.
    divergence: dict[int, float] = {}
    methods: list[str] = []  # selectors that heads could get
    choosing: dict[str, float] = {}  # seconds of a step in a layer, of list selectors' settings
    seconds: float  # it took
