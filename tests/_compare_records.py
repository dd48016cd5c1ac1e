"""A comparison that never took place, for tests of what is said of one."""

from __future__ import annotations

from datetime import UTC, datetime

from _report_records import FACTS

from vllm_sparse_backend.compare.methods import SALE_PAPER
from vllm_sparse_backend.compare.results import Comparison, MethodResult, Perplexity, Point
from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, AnyPolicy, Static, label

LENGTHS = [4096, 16384]
DENSE_SECONDS = {4096: 1.0, 16384: 10.0}
DEFAULT = label(UNIFORM_DEFAULT)


def point(
    policy: AnyPolicy | None, length: int, error: float, time: float, select: float = 0.05,
    setting: str = "", spread: float = 0.02,
) -> Point:  # fmt: skip
    """Times fall with the length."""
    time *= (4096 / length) ** 0.5
    return Point(
        setting=setting or label(policy or DENSE), policy=policy, length=length, error=error,
        tail=4 * error, recall=1 - error, worst_recall=1 - 5 * error, density=time / 2, time=time,
        select=select, spread=spread, seconds=time * DENSE_SECONDS[length],
        select_seconds=select * DENSE_SECONDS[length],
    )  # fmt: skip


def ladder(
    name: str, *settings: tuple[AnyPolicy | None, float, float], own: bool = False,
    listed: bool = False, what: str = "a rule", setting: str = "",
) -> MethodResult:  # fmt: skip
    """Of (policy, error, time at 4096 tokens); the same errors at every length."""
    points = [
        point(policy, length, error, time, setting=setting)
        for length in LENGTHS
        for policy, error, time in settings
    ]
    return MethodResult(name=name, what=what, listed=listed, own=own, points=points)


def default_at(tau_factor: float) -> AnyPolicy:
    """A setting of the default's ladder."""
    return UNIFORM_DEFAULT.model_copy(update={"tau": UNIFORM_DEFAULT.tau * tau_factor})


def methods() -> list[MethodResult]:
    """The default's takes half of SALE's time at its error and 0.8 of another's."""
    return [
        ladder("dense", (DENSE, 0.0017, 0.5)),
        ladder(
            UNIFORM_DEFAULT.selector,
            (default_at(0.5), 0.01, 0.3),
            (UNIFORM_DEFAULT, 0.02, 0.2),
            (default_at(2), 0.04, 0.15),
            own=True,
        ),
        ladder("sale-paper", (SALE_PAPER, 0.02, 0.4)),
        ladder(
            "static", (Static(local=4096), 0.02, 0.25), (Static(local=512), 0.08, 0.2), listed=True
        ),
        ladder("far", (Static(local=16), 0.9, 1.3)),
    ]


def comparison(**more: object) -> Comparison:
    """At two lengths; errors to reach are 0.02 and 0.01."""
    fields: dict[str, object] = {
        "made_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        "model": "a-model",
        "facts": FACTS,
        "layers": [2],
        "sparse_layers": [0, 1, 2, 3],
        "dtype": "bfloat16",
        "isa": "avx2",
        "threads": 1,
        "machine": this_machine(),
        "chunk_tokens": 2048,
        "hf_overrides": None,
        "texts": ["a book"],
        "seed": 0,
        "repeats": 3,
        "blocks": 16,
        "lengths": LENGTHS,
        "errors": [0.02, 0.01],
        "dense": "CPU_ATTN",
        "dense_seconds": DENSE_SECONDS,
        "default": DEFAULT,
        "default_method": UNIFORM_DEFAULT.selector,
        "methods": methods(),
        "left_out": {"seer": "no settings of its own"},
        "repeat": "vllm-sparse compare a-model --text book.txt",
    }
    return Comparison.model_validate(fields | more)


def perplexity(setting: str, change: float, error: float | None = 0.05) -> Perplexity:
    """Of a text."""
    return Perplexity(
        setting=setting, task="text", length=4096, tokens=2000, dense=10.0,
        sparse=10.0 * (1 + change / 100), change_percent=change, error_percent=error, density=0.2,
    )  # fmt: skip
