"""What one request may ask of sparse prefill, and what keeps its prefix-cache blocks apart.

``vllm_xargs`` of the OpenAI API, which is ``SamplingParams.extra_args``::

    {"sparse_prefill": "off"}                  every token of this request dense
    {"sparse_prefill": "on"}                   as the server is configured; so is saying nothing
    {"sparse_prefill": "threshold_scale=2"}    thresholds twice as high: fewer tiles, faster

vLLM's endpoints let no object through there; in Python ``{"threshold_scale": 2.0}`` says the same.
Pure: neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_sparse_backend.errors import LONGEST, describe

FIELD = "sparse_prefill"
ON, OFF = "on", "off"
# Beyond these a policy is another one: nearly everything kept, or nearly nothing.
LEAST_SCALE, MOST_SCALE = 0.01, 100.0
WANTED = (
    f'want "{ON}", "{OFF}" or "threshold_scale=X" with X from {LEAST_SCALE:g} to {MOST_SCALE:g}'
)
SALT = FIELD + ":"
MOST_CHARACTERS = 300  # of what is said of wrong fields


class ControlError(ValueError):
    """A request asks for what it cannot have; the message says what it may ask for."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How one request is prefilled; as the server is configured unless said otherwise."""

    off: bool = False
    threshold_scale: float = 1.0  # factor on `tau` of every policy that has one

    @property
    def text(self) -> str:
        """One text for one setting, however it was written; `parse` reads it."""
        if self.off:
            return OFF
        return ON if self.threshold_scale == 1 else f"threshold_scale={self.threshold_scale!r}"


DEFAULT = Setting()


class _Scaled(BaseModel):
    """The fields of a setting that is neither on nor off."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    threshold_scale: float = Field(ge=LEAST_SCALE, le=MOST_SCALE)


def parse(value: object) -> Setting:
    """The setting that a request asks for. Raises ControlError."""
    if value == ON:
        return DEFAULT
    if value == OFF:
        return Setting(off=True)
    try:
        if isinstance(value, str) and "=" in value:
            name, _, number = value.partition("=")
            fields = {name.strip(): number.strip()}
            return _of(_Scaled.model_validate_strings(_without_budget(fields)))
        if isinstance(value, Mapping):
            return _of(_Scaled.model_validate(_without_budget(value)))
    except ValidationError as error:
        # A name, too, is whatever the client made up: one line of bounded length, all the same.
        message = " ".join(describe(error, _Scaled.model_fields).split())
        raise ControlError(f"{FIELD}: {message[:MOST_CHARACTERS]}") from None
    came = repr(value)
    raise ControlError(
        f"{FIELD}: {WANTED}, got {came if len(came) <= LONGEST else came[: LONGEST - 3] + '...'}"
    )


def asked(extra_args: Mapping[str, Any] | None) -> Setting | None:
    """What a request's ``extra_args`` ask for; None: nothing. Raises ControlError."""
    for name in extra_args or ():
        # A misspelt name would be ignored without a word.
        if name != FIELD and name.lower().replace("-", "_") in (FIELD, FIELD.replace("_", "")):
            raise ControlError(f"vllm_xargs: want the name {FIELD!r}, got {name!r}")
    return parse(extra_args[FIELD]) if extra_args and FIELD in extra_args else None


def salted(setting: Setting, salt: str | None) -> str | None:
    """The cache salt of a request with this setting and the user's own ``salt``.

    No two pairs of setting and salt have the same, whatever users make up; a request that asks for
    nothing keeps its own, unless that looks like one of ours. Within what vLLM allows of salts: at
    most 128 characters, no slash.
    """
    if setting == DEFAULT and not (salt or "").startswith(SALT):
        return salt
    own = hashlib.sha256(salt.encode()).hexdigest() if salt else ""
    return f"{SALT}{setting.text};{own}"


# Between the processes of a server a setting travels as a request's extra argument again, in a form
# that no client can write: what no admission has seen has no salt either, and is not followed.
_ADMITTED = "admitted"


def admitted(extra_args: Mapping[str, Any] | None, setting: Setting) -> dict[str, Any]:
    """``extra_args`` as they go on to the workers."""
    others = {name: value for name, value in (extra_args or {}).items() if name != FIELD}
    return others if setting == DEFAULT else {**others, FIELD: {_ADMITTED: setting.text}}


def received(extra_args: Mapping[str, Any] | None) -> Setting:
    """What of it came to a worker. Raises ControlError if nobody has admitted it."""
    if not extra_args or FIELD not in extra_args:
        return DEFAULT
    value = extra_args[FIELD]
    if isinstance(value, Mapping) and isinstance(text := value.get(_ADMITTED), str):
        return _parse_text(text)
    raise ControlError(f"{FIELD}: {value!r} came past the server's own checks of requests")


@lru_cache(maxsize=256)
def _parse_text(text: str) -> Setting:
    return parse(text)


def _without_budget(fields: Mapping[str, Any]) -> dict[str, Any]:
    if "error_budget" in fields:
        raise ControlError(
            f"{FIELD}: error_budget: a profile holds one threshold for each head, for the budget "
            "that it was calibrated to; want threshold_scale, or a server with another profile"
        )
    return dict(fields)


def _of(fields: _Scaled) -> Setting:
    return Setting(threshold_scale=fields.threshold_scale)
