"""The one configuration object, and the only place that reads the environment.

``--additional-config '{"sparse_prefill": {"profile": "...", ...}}'``; every field can be
overridden by ``VLLM_SPARSE_PREFILL_<FIELD>``. What is unknown is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from vllm_sparse_backend.errors import ConfigError, describe, unknown
from vllm_sparse_backend.selection import Policy

SECTION = "sparse_prefill"
ENV_PREFIX = "VLLM_SPARSE_PREFILL_"
SOURCES = frozenset({"profile", "profile_digest", "policy"})
# Of setup.py, at install time; an image may well leave it set.
BUILD_VARIABLE = ENV_PREFIX + "BUILD"
# Set by us for our own child processes; not VLLM_*, which vLLM would warn about.
SESSION_VARIABLE = "SPARSE_PREFILL_SESSION"


class SparseConfig(BaseModel):
    """How the backend behaves; the same in every process of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    enabled: bool = Field(default=True, description="false: everything runs dense")
    profile: str | None = Field(default=None, min_length=1, description="path of a profile file")
    profile_digest: str | None = Field(
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="the profile must have this digest; unless given, what the first process of a "
        "server has loaded, which all others then must have, too",
    )
    policy: Policy | None = Field(
        default=None, description="one policy for every head, instead of a profile"
    )
    min_prompt_tokens: int = Field(
        default=2048, ge=1, description="a request's context is dense while it is shorter"
    )
    min_query_tokens: int = Field(
        default=64, ge=1, description="a step of fewer query tokens of a request is dense"
    )
    dense_core: bool = Field(
        default=True,
        description="contexts too short to be sparse are computed by this package's core, every "
        "tile kept, where that is faster than CPU_ATTN; false: all that is dense is CPU_ATTN's; "
        "on a CPU only",
    )
    kept_prompts: int = Field(
        default=0,
        ge=0,
        le=64,
        description="prompts in progress whose keys' codes are kept from one chunk to the next "
        "instead of being made anew: one byte a channel of each key (half of one where fp4 is "
        "multiplied as such), for max_model_len tokens each; on a GPU only",
    )
    cpu_isa: str | None = Field(
        default=None, min_length=1, description="force an instruction set of the CPU core"
    )

    @model_validator(mode="after")
    def _one_source_of_policies(self) -> SparseConfig:
        if self.profile is not None and self.policy is not None:
            raise ValueError("want profile or policy, not both")
        if self.profile_digest is not None and self.policy is not None:
            raise ValueError("want profile_digest or policy, not both: a policy has no digest")
        return self


def load_config(
    additional_config: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None
) -> SparseConfig:
    """The configuration from vLLM's ``--additional-config`` and the environment.

    ``additional_config`` is the whole of it; other keys belong to others. ``environ``:
    ``os.environ`` unless given. Raises ConfigError naming the field or variable.
    """
    fields = {**_section(additional_config), **_overrides(environ)}
    try:
        return SparseConfig.model_validate(fields)
    except ValidationError as error:
        known = SparseConfig.model_fields
        raise ConfigError(f"{SECTION} configuration: {describe(error, known)}") from None


def environment_names() -> list[str]:
    """The variables that override a field."""
    return [ENV_PREFIX + name.upper() for name in SparseConfig.model_fields]


def overrides_in(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment variables of ours that are set, known or not."""
    source = os.environ if environ is None else environ
    return {name: source[name] for name in sorted(source) if name.startswith(ENV_PREFIX)}


def refuse_overrides(
    section: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> None:
    """For a command that measures under a section of its own: raise ConfigError, naming it, for a
    variable that would change that, and for a wrong one.

    ``section``: only variables of its fields count. Unless given, all do, for what measures at the
    defaults, but ``cpu_isa``, which says what computes and not what.
    """
    if section is None:
        taken = set(SparseConfig.model_fields) - {"cpu_isa"}
    else:
        taken = set(section)
        if taken & SOURCES:  # one would stand beside the other, which is an error
            taken |= SOURCES
    _overrides(environ)
    for variable, text in overrides_in(environ).items():
        if variable.removeprefix(ENV_PREFIX).lower() in taken:
            raise ConfigError(
                f"{variable}: want it unset, as it would change what this command measures, "
                f"got {text!r}"
            )


def allowed_plugins(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """The names ``VLLM_PLUGINS`` admits; None: all."""
    value = (os.environ if environ is None else environ).get("VLLM_PLUGINS")
    return None if value is None else value.split(",")


def asks_for_huge_pages(environ: Mapping[str, str] | None = None) -> bool:
    """Whether torch takes huge pages for large tensors, where the system leaves that open."""
    return (os.environ if environ is None else environ).get("THP_MEM_ALLOC_ENABLE") == "1"


def prometheus_multiprocess(environ: Mapping[str, str] | None = None) -> bool:
    """Whether /metrics is put together from the files of ``PROMETHEUS_MULTIPROC_DIR``."""
    return "PROMETHEUS_MULTIPROC_DIR" in (os.environ if environ is None else environ)


def session_directory(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where the processes of this server keep their counters, if a parent has said so."""
    value = (os.environ if environ is None else environ).get(SESSION_VARIABLE)
    return Path(value) if value else None


def announce_session(directory: Path, environ: MutableMapping[str, str] | None = None) -> None:
    """Have the child processes to come find ``directory``."""
    (os.environ if environ is None else environ)[SESSION_VARIABLE] = str(directory)


@contextmanager
def vllm_log_level(level: str) -> Iterator[None]:
    """vLLM's log level, should it be imported in the meantime."""
    before = os.environ.get("VLLM_LOGGING_LEVEL")
    os.environ["VLLM_LOGGING_LEVEL"] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_LOGGING_LEVEL"]
        else:
            os.environ["VLLM_LOGGING_LEVEL"] = before


def _section(additional_config: Mapping[str, Any] | None) -> dict[str, Any]:
    additional_config = additional_config or {}
    for key in additional_config:
        # A misspelt section would be ignored without a word.
        if key != SECTION and str(key).lower().replace("-", "_") in (SECTION, "sparseprefill"):
            raise ConfigError(f"additional config: want the key {SECTION!r}, got {key!r}")
    section = additional_config.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} configuration: want an object of fields, got {section!r}")
    return dict(section)


def _overrides(environ: Mapping[str, str] | None) -> dict[str, Any]:
    fields = {}
    for variable, text in overrides_in(environ).items():
        name = variable.removeprefix(ENV_PREFIX).lower()
        if variable == BUILD_VARIABLE:
            continue
        if name not in SparseConfig.model_fields:
            # Compared without the prefix, which makes any two of them look alike.
            known = [field.upper() for field in SparseConfig.model_fields]
            raise ConfigError(f"{variable}: {unknown(name.upper(), known)}")
        try:
            fields[name] = _parse(name, text)
        except ValidationError as error:
            message = describe(error).removeprefix("file: ")
            raise ConfigError(f"{variable}: {message}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{variable}: want JSON, got {text!r} ({error})") from None
    return fields


def _parse(name: str, text: str) -> Any:
    field = SparseConfig.model_fields[name]
    if not text and field.default is None:  # NAME= takes back what --additional-config set
        return None
    # With the field's bounds, so that it is the variable that is named when they do not hold.
    bounded: Any = Annotated[field.annotation, Field(), *field.metadata]
    adapter: TypeAdapter[Any] = TypeAdapter(bounded)
    if name == "policy":
        return adapter.validate_python(json.loads(text))
    return adapter.validate_strings(text)
