"""Profiles: a policy for every (layer, head) of one model, in a file.

A hand-written profile needs no more than ``format``, ``version``, ``model`` and what differs
from ``defaults``::

    {
      "format": "vllm-sparse-profile",
      "version": 1,
      "model": {"architecture": "LlamaForCausalLM", "num_layers": 30, "num_heads": 9,
                "num_kv_heads": 3, "head_dim": 64},
      "defaults": {"selector": "sale", "tau": 0.008},
      "policies": {"0": {"*": {"selector": "dense"}}, "7": {"3": {"selector": "static"}}}
    }

Layers and heads are counted over the whole model, from 0, whatever the parallelism it is
served with. ``"*"`` stands for the heads of a layer that are not named.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_sparse_backend.errors import ProfileError, ProfileMismatch, SelectorError, describe
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, Policy

FORMAT = "vllm-sparse-profile"
VERSION = 1
MAX_BYTES = 16 << 20  # 128 layers of 128 heads, every one written out, take 2 MB
ALL_HEADS = "*"

_COUNT = Field(ge=1, le=1 << 16)
_NAMES = BeforeValidator(lambda key: str(key) if type(key) is int else key)
Layer = Annotated[str, _NAMES, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]
Head = Annotated[str, _NAMES, Field(pattern=r"^(\*|0|[1-9][0-9]{0,4})$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelFacts(_Part):
    """What a profile must have in common with the model that is served."""

    architecture: str = Field(min_length=1, description="as config.json's architectures[0]")
    num_layers: Annotated[int, _COUNT]
    num_heads: Annotated[int, _COUNT] = Field(description="query heads of a layer, all ranks")
    num_kv_heads: Annotated[int, _COUNT]
    head_dim: Annotated[int, _COUNT]
    digest: str | None = Field(
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="of the architecture's sizes, see `architecture_digest`; "
        "without one the numbers alone decide",
    )


class Calibration(_Part):
    """What the policies were chosen on, and what that gave; not read when serving."""

    texts: list[str] = Field(default=[], description="what was read, by name")
    lengths: list[Annotated[int, Field(ge=1)]] = Field(default=[], description="tokens")
    error_budget: float | None = Field(default=None, ge=0.0, le=1.0, description="relative L1")
    seed: int | None = None
    figures: dict[str, float] = Field(default={}, description="measured, by name")
    note: str | None = None


class Profile(_Part):
    """A policy for every (layer, head) of the model with these facts."""

    format: Literal["vllm-sparse-profile"]
    version: Literal[1]
    name: str = Field(default="", max_length=200, description="shown; the file's name unless given")
    model: ModelFacts
    calibration: Calibration | None = None
    defaults: Policy = Field(
        default=UNIFORM_DEFAULT, description="for heads without a policy of their own"
    )
    policies: dict[Layer, dict[Head, Policy]] = Field(
        default={}, description='layer, then head or "*"; counted over the whole model'
    )

    @classmethod
    def build(
        cls,
        model: ModelFacts,
        policies: Mapping[int, Mapping[int, Policy]],
        **more: Any,
    ) -> Profile:
        """A profile from policies by layer and head; ``more``: its other fields."""
        return cls.model_validate(
            {"format": FORMAT, "version": VERSION, "model": model, "policies": policies, **more}
        )

    @property
    def digest(self) -> str:
        """Of what decides the attention: the model's facts and the policies."""
        return _digest(self.model_dump(mode="json", include={"model", "defaults", "policies"}))

    def match(self, facts: ModelFacts) -> None:
        """Raise ProfileMismatch naming every number that is not the served model's.

        Also for a layer or head that the model does not have.
        """
        wrong = [
            f"{name}: the profile has {ours}, the model {theirs}"
            for name, ours in self.model.model_dump(exclude={"digest"}).items()
            if ours != (theirs := getattr(facts, name))
        ]
        known = self.model.digest and facts.digest
        if not wrong and known and self.model.digest != facts.digest:
            wrong = [f"digest: the profile has {self.model.digest}, the model {facts.digest}"]
        wrong = wrong or self._out_of_range(facts)
        if wrong:
            raise ProfileMismatch(
                f"profile {self.name!r} does not fit the model: {'; '.join(wrong)}"
            )

    def for_layer(self, layer: int) -> list[Policy]:
        """The policies of the layer's ``model.num_heads`` q heads, in order."""
        heads = self.policies.get(str(layer), {})
        rest = heads.get(ALL_HEADS, self.defaults)
        return [heads.get(str(head), rest) for head in range(self.model.num_heads)]

    def kinds(self) -> set[Policy]:
        """Every policy that some head follows."""
        return {policy for n in range(self.model.num_layers) for policy in self.for_layer(n)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        target = Path(path)
        text = self.model_dump_json(exclude_none=True, indent=2) + "\n"
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=target.name, delete=False, encoding="utf-8"
        ) as scratch:
            try:
                scratch.write(text)
                scratch.flush()
                os.chmod(scratch.name, 0o644)  # a profile is no secret; mkstemp says 0600
                os.replace(scratch.name, target)
            except BaseException:
                os.unlink(scratch.name)
                raise

    def _out_of_range(self, facts: ModelFacts) -> list[str]:
        wrong = []
        for layer, heads in self.policies.items():
            if int(layer) >= facts.num_layers:
                wrong.append(f"policies.{layer}: the model has layers 0 to {facts.num_layers - 1}")
                continue
            wrong.extend(
                f"policies.{layer}.{head}: the model has heads 0 to {facts.num_heads - 1}"
                for head in heads
                if head != ALL_HEADS and int(head) >= facts.num_heads
            )
        return wrong


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in a file. Raises ProfileError saying what is wrong with which file."""
    where = Path(path)
    text = read_text(where)
    try:
        json.loads(text, object_pairs_hook=no_duplicates)
        profile = Profile.model_validate_json(text)
    except ValidationError as error:
        raise ProfileError(f"profile {where}: {describe(error, Profile.model_fields)}") from None
    except json.JSONDecodeError as error:
        raise ProfileError(f"profile {where}: not valid JSON: {error}") from None
    except (ValueError, RecursionError, SelectorError) as error:
        raise ProfileError(f"profile {where}: {error}") from None
    return profile if profile.name else profile.model_copy(update={"name": where.stem})


def architecture_digest(facts: ModelFacts, **sizes: object) -> str:
    """A digest of what makes two checkpoints the same architecture.

    ``facts`` and the further ``sizes`` (model_type, hidden_size, intermediate_size,
    vocab_size). RoPE scaling, the number of positions and the dtype are no part of it:
    serving a model with ``--hf-overrides`` for longer contexts keeps its profile.
    """
    return _digest({**facts.model_dump(exclude={"digest"}), **sizes})


def local_heads(policies: list[Policy], tp_rank: int, num_local: int) -> list[Policy]:
    """The share of a layer's policies that a tensor parallel rank with ``num_local`` q heads
    computes: global head = ``tp_rank * num_local + local``. Raises ValueError beyond the end.
    """
    first = tp_rank * num_local
    if not 0 <= first <= len(policies) - num_local:
        raise ValueError(
            f"tensor parallel rank {tp_rank}: want {num_local} heads from head {first}, "
            f"the layer has {len(policies)}"
        )
    return policies[first : first + num_local]


def schema() -> dict[str, Any]:
    """The file format as JSON Schema."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Profile.model_json_schema(),
    }


def read_text(path: Path, what: str = "profile") -> str:
    """A file's text, if it is a regular file of at most `MAX_BYTES`. Raises ProfileError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            came = "a directory" if stat.S_ISDIR(status.st_mode) else "something else"
            raise ProfileError(f"{what} {path}: want a regular file, got {came}")
        if status.st_size > MAX_BYTES:
            raise ProfileError(
                f"{what} {path}: want at most {MAX_BYTES} bytes, got {status.st_size}"
            )
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{what} {path}: not UTF-8 text: {error.reason}") from None
    except OSError as error:  # missing, not readable
        raise ProfileError(f"{what} {path}: {error.strerror}") from None
    except ValueError as error:  # a path that no file can have
        raise ProfileError(f"{what} {str(path)!r}: {error}") from None


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` that refuses a key that stands twice; raises ValueError."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return found


def _digest(value: Mapping[str, Any]) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
