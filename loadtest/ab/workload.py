"""What a load test sends: a YAML file, checked before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_sparse_backend.errors import SparsePrefillError, describe

FOLDER = Path(__file__).parent / "workloads"
Kind = Literal["text", "question", "passages", "shared_prefix"]
# Fields that mean something to one kind of requests only.
FIELDS_OF: dict[str, Kind] = {
    "passages": "passages",
    "prefix_tokens": "shared_prefix",
    "prefixes": "shared_prefix",
}


class WorkloadError(SparsePrefillError):
    """A workload's file is wrong; the message says where."""


class _Strict(BaseModel):
    # In JSON a rate of infinity is "Infinity", which is read again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Requests(_Strict):
    """Requests of one kind.

    text: real text, to be continued. question: a document that hides a number, which is asked for
    at its end. passages: the same in pieces from different places, as a retriever brings them.
    shared_prefix: documents that several requests begin with, each with a question of its own.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Kind = "text"
    count: int = Field(ge=1)
    prompt_tokens: int | tuple[int, int]  # a pair: from, to; drawn log-uniformly
    output_tokens: int = Field(ge=1)
    passages: int | None = Field(default=None, ge=2)  # 8 unless said otherwise
    prefix_tokens: int | None = None  # of each shared prefix
    prefixes: int | None = Field(default=None, ge=1)  # how many there are: 1 unless said otherwise

    @property
    def shortest(self) -> int:
        return self.prompt_tokens if isinstance(self.prompt_tokens, int) else self.prompt_tokens[0]

    @property
    def longest(self) -> int:
        return self.prompt_tokens if isinstance(self.prompt_tokens, int) else self.prompt_tokens[1]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not 16 <= self.shortest <= self.longest:
            raise ValueError(
                f"{self.name}: prompt_tokens: want 16 or more, as a number or from, to; "
                f"got {self.prompt_tokens}"
            )
        for field, kind in FIELDS_OF.items():
            if getattr(self, field) is not None and self.kind != kind:
                raise ValueError(f"{self.name}: {field}: is of kind {kind}, got {self.kind}")
        most = self.shortest - 64
        if self.kind == "shared_prefix" and not 64 <= (self.prefix_tokens or 0) <= most:
            raise ValueError(
                f"{self.name}: prefix_tokens: want 64 to {most}, 64 less than the shortest prompt; "
                f"got {self.prefix_tokens}"
            )
        return self


class Traffic(_Strict):
    """When requests are sent. `vllm bench serve` sends them; the options are its own."""

    request_rate: float = Field(gt=0)  # a second, on average; .inf: all at once
    burstiness: float = Field(default=1.0, gt=0)  # 1: Poisson; less: bursts; more: regular
    max_concurrency: int | None = Field(default=None, ge=1)
    # Requests of one token a second beside the others, for how long the server keeps them waiting.
    probe_rate: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Served(_Strict):
    """How both servers are started."""

    max_model_len: int = Field(ge=512)
    chunk_tokens: int = Field(default=2048, ge=128)
    max_num_seqs: int = Field(default=64, ge=1)
    eager: bool = False  # starts faster, without torch.compile
    arguments: tuple[str, ...] = ()  # further ones of `vllm serve`


class Slo(_Strict):
    """What a request may take. A long prompt may take longer to its first token."""

    ttft_seconds: float = Field(gt=0)
    ttft_seconds_per_1000_tokens: float = Field(default=0.0, ge=0)
    tpot_seconds: float | None = Field(default=None, gt=0)  # between two tokens; None: any time

    def ttft_limit(self, prompt_tokens: int) -> float:
        """Seconds that a prompt of so many tokens may take to its first token."""
        return self.ttft_seconds + self.ttft_seconds_per_1000_tokens * prompt_tokens / 1000


class Bounds(_Strict):
    """What the sparse side must keep to; None: not asked for."""

    max_ttft_ratio: float | None = Field(default=None, gt=0)
    max_short_wait_ratio: float | None = Field(default=None, gt=0)
    max_request_ratio: float | None = Field(default=None, gt=0)
    min_throughput_ratio: float | None = Field(default=None, gt=0)
    max_lost_answers: int | None = Field(default=None, ge=0)


class Workload(_Strict):
    """A file of `loadtest/ab/workloads`, or your own."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    about: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)  # of prompts, their order and their arrivals
    text: tuple[str, ...] = ()  # files and folders, relative to the file; none: Python's own
    server: Served
    traffic: Traffic
    requests: Annotated[tuple[Requests, ...], Field(min_length=1)]
    short_tokens: int = Field(default=1024, ge=16)  # prompts up to this are "short"
    slo: Slo
    bounds: Bounds = Bounds()

    @field_validator("requests")
    @classmethod
    def _names_differ(cls, requests: tuple[Requests, ...]) -> tuple[Requests, ...]:
        names = [each.name for each in requests]
        if len(set(names)) < len(names):
            raise ValueError(f"requests: want a name of its own for each, got {', '.join(names)}")
        return requests

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for each in self.requests:
            if (total := each.longest + each.output_tokens) > self.server.max_model_len:
                raise ValueError(
                    f"{each.name}: prompt and output have up to {total} tokens, want at most "
                    f"max_model_len, {self.server.max_model_len}"
                )
        return self

    @property
    def count(self) -> int:
        """Requests of one repetition."""
        return sum(each.count for each in self.requests)


def load_workload(name: str) -> Workload:
    """A workload that ships, by its name, or the one in a file. Raises WorkloadError."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml", ".json") else _shipped(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise WorkloadError(f"workload {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise WorkloadError(f"workload {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise WorkloadError(f"workload {path}: want a mapping, got {type(content).__name__}")
    try:
        workload = Workload.model_validate(content)
    except ValidationError as error:
        raise WorkloadError(
            f"workload {path}: {describe(error, known=Workload.model_fields)}"
        ) from None
    text = tuple(str(path.parent / each) for each in workload.text)
    return workload.model_copy(update={"text": text})


def shipped() -> Iterator[str]:
    """The names of those that ship."""
    return (path.stem for path in sorted(FOLDER.glob("*.yaml")))


def _shipped(name: str) -> Path:
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise WorkloadError(f"workload {name}: want a .yaml file, or one of {', '.join(shipped())}")
    return path
