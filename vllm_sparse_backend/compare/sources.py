"""Digests of what computes: of another core or selector nothing counts as measured."""

from __future__ import annotations

import sys
from functools import cache
from hashlib import sha256
from pathlib import Path

from vllm_sparse_backend.compare.store import digest
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.selection import AnyPolicy, ListSelector


@cache
def core_digest() -> str:
    """Of the compiled core: another one is as fast as it is."""
    return sha256(core.library().read_bytes()).hexdigest()


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


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
