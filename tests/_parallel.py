"""A profile whose heads differ, and answers to be compared, for tests with several workers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _engine import Answer, Result

FLOAT = {"dtype": "float32"}  # in which ties are so rare that tokens can be compared
# As unlike as policies can be, and none of them by scores: which tiles are left out is then the
# same however sums are rounded, so that tiles can be compared exactly.
DENSE: dict[str, Any] = {"selector": "dense"}
HEADS: list[list[dict[str, Any]]] = [
    [
        DENSE,
        {"selector": "static", "sink": 16, "local": 64},
        {"selector": "static", "sink": 64, "local": 512},
        {"selector": "static", "sink": 16, "local": 1024},
    ],
    [
        {"selector": "static", "sink": 16, "local": 128},
        DENSE,
        {"selector": "static", "sink": 16, "local": 256},
        {"selector": "static", "sink": 320, "local": 64},
    ],
]
WHOLE: list[int | None] = [0, 1, 2, 3]


def write_profile(path: Path, layers: Sequence[Sequence[dict[str, Any]]], **model: Any) -> Path:
    """A profile with these policies of every layer's heads."""
    policies = {
        str(layer): {str(head): policy for head, policy in enumerate(heads)}
        for layer, heads in enumerate(layers)
    }
    facts = {
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        **model,
    }
    content = {"format": "vllm-sparse-profile", "version": 1, "model": facts, "policies": policies}
    path.write_text(json.dumps(content))
    return path


def section(path: Path, heads: Sequence[int | None] = WHOLE) -> dict[str, Any]:
    """The configuration with a profile of `HEADS` in this order."""
    layers = [[DENSE if head is None else layer[head] for head in heads] for layer in HEADS]
    # Of the core's share of short prompts, how many heads a rank has decides.
    profile = str(write_profile(path, layers))
    return {"min_prompt_tokens": 512, "dense_core": False, "profile": profile}


def flat(result: Result) -> list[Answer]:
    return list(itertools.chain.from_iterable(result.answers))


def apart(some: Iterable[Answer], others: Iterable[Answer]) -> float:
    """The largest difference of two logprobs, in nats."""
    return max(
        abs(a - b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(
            [*one.prompt_logprobs, *one.logprobs],
            [*other.prompt_logprobs, *other.logprobs],
            strict=True,
        )
    )
