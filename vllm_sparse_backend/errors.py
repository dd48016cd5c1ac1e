"""What stops a start, and how a validation error becomes one clear line.

The base is RuntimeError on purpose: these are raised while vLLM builds its configuration, a
pydantic dataclass, which would wrap a ValueError into a report of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from types import TracebackType

from pydantic import ValidationError

SHOWN = 4  # further problems of one file are counted only
LONGEST = 60  # characters of a value that are shown


class SparsePrefillError(RuntimeError):
    """The sparse_prefill backend cannot run as asked; the message says what to change."""


class ConfigError(SparsePrefillError):
    """A field or environment variable of the configuration is wrong."""


class ProfileError(SparsePrefillError):
    """A profile file cannot be read or is not a valid profile."""


class ProfileMismatch(ProfileError):
    """A valid profile, but of another model."""


class SelectorError(SparsePrefillError):
    """A list selector cannot be imported, or does not do what one owes."""


class TextError(SparsePrefillError):
    """A text cannot be read, or is too short for what was asked of it."""


@cache
def hide_traceback() -> None:
    """Have a SparsePrefillError that ends this process print its message and nothing else.

    What went wrong lies in the user's input, not in the twenty calls that led here.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, SparsePrefillError):
            print(f"error: sparse_prefill: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def unknown(name: str, known: Iterable[str]) -> str:
    """What to say about a name that is none of ``known``."""
    choices = sorted(known)
    close = get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"
    return f"unknown field ({hint})"


def describe(error: ValidationError, known: Iterable[str] = ()) -> str:
    """A validation error as one line: ``where: what was wanted, got what came; ...``.

    ``known`` are the top level's field names, to suggest one for a misspelt field.
    """
    problems = error.errors(include_url=False, include_context=False)
    lines = []
    for problem in problems[:SHOWN]:
        where = ".".join(str(part) for part in problem["loc"]) or "file"
        if problem["type"] == "extra_forbidden":
            at_top = len(problem["loc"]) == 1 and known
            lines.append(f"{where}: {unknown(where, known) if at_top else 'unknown field'}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: missing")
        elif problem["type"] == "json_invalid":
            lines.append(f"not valid JSON: {problem['msg'].removeprefix('Invalid JSON: ')}")
        elif problem["type"] == "value_error":  # of a validator of ours: it has said it all
            lines.append(problem["msg"].removeprefix("Value error, "))
        else:
            wanted = problem["msg"][:1].lower() + problem["msg"][1:]
            lines.append(f"{where}: {wanted}, got {_short(problem['input'])}")
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return "; ".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
