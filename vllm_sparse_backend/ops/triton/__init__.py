"""The GPU core: selection and block-sparse attention in Triton, over vLLM's paged KV cache.

Nothing is imported here before it is used: triton reads its environment when a kernel is decorated.
"""

from __future__ import annotations

from typing import Any

_PLACES = {
    "DTYPES": "launch",
    "HEAD_DIMS": "launch",
    "Clock": "clock",
    "KeptCodes": "kept",
    "Shelf": "kept",
    "Work": "work",
    "check_device": "launch",
    "choose_of_zeros": "listed",
    "forward": "run",
    "heads_of": "heads",
    "kept_bytes": "kept",
    "plan_work": "work",
    "plan_works": "work",
    "select": "run",
    "warm_up": "warm",
    "workspace": "run",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
