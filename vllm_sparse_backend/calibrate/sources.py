"""Digests of what computes: of another core, selector or file of one nothing counts as measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.selection import AnyPolicy, ListSelector


def digest(decides: Any) -> str:
    """A key of all that a result depends on."""
    return sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@cache
def core_digest() -> str:
    """Of the compiled core: another one is as fast as it is."""
    return sha256(core.library().read_bytes()).hexdigest()


def made_of(policies: Iterable[AnyPolicy]) -> list[str]:
    """What some policies choose with, beside their own fields: their sources and their files.

    Raises SelectorError for a file that cannot be read.
    """
    its = list(policies)
    sources = sorted({source_digest(type(policy)) for policy in its})
    files = {file for it in its if isinstance(it, ListSelector) for file in it.files()}
    return sources + [file_digest(file) for file in sorted(files)]


@cache
def source_digest(selector: type[AnyPolicy]) -> str:
    """Of the module that a list selector is written in, and of those of its package that this takes
    something from; "" for what the core is compiled of."""
    if not issubclass(selector, ListSelector):
        return ""
    package = selector.__module__.partition(".")[0]
    names, seen = [selector.__module__], set[str]()
    while names:
        name = names.pop()
        if name not in seen:
            seen.add(name)
            taken = (getattr(its, "__module__", None) for its in vars(sys.modules[name]).values())
            names += [its for its in taken if its in sys.modules and _within(its, package)]
    files = [sys.modules[name].__file__ for name in sorted(seen)]
    return digest([sha256(Path(file).read_bytes()).hexdigest() for file in files if file])


@cache
def file_digest(path: str) -> str:
    """Of a file that a selector chooses with. Taken once, as selectors read theirs once."""
    try:
        return sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise SelectorError(f"{path}: {error.strerror}") from None


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
