"""What the benchmark runs on: shapes of models, and which part of a prompt one call computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vllm_sparse_backend.compare import layer as plain
from vllm_sparse_backend.ops.tiles import Q_BLOCK

CHUNK = 2048  # rows of a long prompt that a server computes in one step
# Fewer heads where a prompt is long: from so many tokens on, q heads x head_dim are at most this.
WIDTHS = ((65536, 512), (8192, 1024))


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    heads: int
    kv_heads: int
    head_dim: int

    def measured(self, length: int) -> Shape:
        """The same with fewer heads, in whole kv groups, where ``length`` is long."""
        group = self.heads // self.kv_heads
        for start, width in WIDTHS:
            if length >= start:
                kept = max(1, min(self.kv_heads, width // (group * self.head_dim)))
                return Shape(kept * group, kept, self.head_dim)
        return self


SHAPES = {
    "smollm2": Shape(9, 3, 64),  # SmolLM2-135M
    "llama": Shape(32, 8, 128),  # Llama-3.1-8B
    "gemma": Shape(4, 1, 256),  # Gemma 3 270M and 1B
}


@dataclass(frozen=True)
class Layer(plain.Layer):
    """Queries, keys and values, and the needles in them."""

    needles: torch.Tensor | None = None  # int64 [N, 3]: row, q head, key; None: not known
    number: int | None = None  # in the model; None: of no model

    def to(self, to: torch.dtype | torch.device) -> Layer:
        """The same in another dtype, or elsewhere; the needles stay where they are."""
        return replace(self, q=self.q.to(to), k=self.k.to(to), v=self.v.to(to))


@dataclass(frozen=True)
class Step:
    """The rows from ``start`` to ``end`` of a prompt, of the keys before ``end``: one call."""

    start: int
    end: int
    weight: float  # how often its seconds count

    def of(self, layer: Layer) -> Layer:
        """Its T = end - start queries and S = end keys; needles' rows count from ``start``."""
        needles = layer.needles
        if needles is not None:
            inside = (needles[:, 0] >= self.start) & (needles[:, 0] < self.end)
            needles = needles[inside] - torch.tensor([self.start, 0, 0])
        part = layer.step(self.start, self.end)
        return Layer(part.q, part.k, part.v, part.prompt_len, part.scale, needles, layer.number)


@dataclass(frozen=True)
class Plan:
    """Which steps of a prompt are measured, and what they stand for."""

    steps: tuple[Step, ...]
    mode: str  # for people


def plan_steps(length: int, rows: int, chunks: int) -> Plan:
    """``rows``: only the last so many of ``length`` tokens; 0: all of them.

    All of them in one call if ``chunks`` is 0. Else in chunks of 2048, and if those are more than
    ``chunks``, the prompt is cut in so many equal strata, of each of which 2048 rows in the
    middle stand for all: exact where a row's cost grows linearly, as dense attention's does.
    """
    if rows:
        return Plan((Step(length - rows, length, 1.0),), f"the last {rows:,} tokens, in one call")
    if not chunks:
        return Plan((Step(0, length, 1.0),), "the whole prompt, in one call")
    count = -(-length // CHUNK)
    if count <= chunks:
        starts = range(0, length, CHUNK)
        steps = tuple(Step(at, min(at + CHUNK, length), 1.0) for at in starts)
        return Plan(steps, f"the whole prompt, in {count} chunks of {CHUNK:,}")
    steps = tuple(_strata(length, chunks))
    return Plan(
        steps, f"the whole prompt, in chunks of {CHUNK:,}, estimated from {chunks} of {count}"
    )


def _strata(length: int, count: int) -> Iterator[Step]:
    width = length / count
    for stratum in range(count):
        middle = (stratum + 0.5) * width
        start = round((middle - CHUNK / 2) / Q_BLOCK) * Q_BLOCK
        yield Step(start, start + CHUNK, width / CHUNK)


def random_layer(shape: Shape, length: int, dtype: torch.dtype, seed: int) -> Layer:
    """White noise, in which every key gets the same attention: for what keeps everything."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(length, heads, shape.head_dim, generator=generator).to(dtype)

    return Layer(normal(shape.heads), normal(shape.kv_heads), normal(shape.kv_heads))
