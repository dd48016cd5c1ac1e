"""Queries, keys and values whose attention looks like a long prompt's, with known needles.

    layer = generate(SHAPES["llama"].measured(16384), 16384, torch.bfloat16, seed=0)

A key has features, each in channels of its own: the *topic* of its surroundings, which changes
slowly; its own *content*, like no other key's; whether it is a *sink*; whether it is in a *column*,
a span of tokens that all later queries look at. A query asks for features; what one is worth to
it is its part of the scaled score, in nats. All channels are then rotated and shifted, as the
offset of real keys does.

Query heads take turns: their own surroundings; the columns; a diagonal, the key a fixed distance
back, as induction heads do; passages on another topic, wherever they are. And now and then, eight
rows of a head, the tokens of a question, look at one far key: the needles.

The worths are chosen so that 98% of the mass takes about an eighth of the tiles at 16K tokens and
half of that share at 128K, and sink and local window alone are far off in three heads of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from inputs import Layer, Shape

SINKS = (1.0, 0.8, 0.8, 0.8)  # how much of a sink the first keys are
TOPIC_TOKENS = 256  # behind which nothing of a topic is left
COLUMNS, COLUMN_GROWTH = 0.73, 0.5  # among the first n keys: COLUMNS * n ** COLUMN_GROWTH
COLUMN_TOKENS = 64  # the longest column
PASSAGE = 1024  # rows for which a diagonal keeps its distance
NEAR = 64 + 256  # tokens a diagonal is away at least: what is within is kept by any policy
NEEDLE_EVERY = 256  # rows of a head
NEEDLE_ROWS = 8
NEEDLE_DISTANCE = 1024  # at least; rows before twice that have none

# Worth in nats.
OWN_TOPIC = 15.0
COLUMN = 16.0
DIAGONAL = 20.0
NEEDLE, NEEDLE_SINK = 20.0, 18.0
# Another topic is worth this much in standard deviations over the keys, at 16K: more behind.
OTHER_TOPIC, TOPIC_GROWTH = 3.1, 0.2


@dataclass(frozen=True)
class Features:
    """Of n keys, or what n queries ask for: views of ``channels``, [n, D]."""

    channels: torch.Tensor

    @classmethod
    def zeros(cls, length: int, head_dim: int) -> Features:
        return cls(torch.zeros(length, head_dim))

    @property
    def topic(self) -> torch.Tensor:
        """[n, 3/8 of D]; of a key, a unit vector."""
        return self.channels[:, : 3 * self.channels.shape[1] // 8]

    @property
    def content(self) -> torch.Tensor:
        """[n, the rest]; of a key, a unit vector."""
        return self.channels[:, 3 * self.channels.shape[1] // 8 : -2]

    @property
    def sink(self) -> torch.Tensor:
        """[n]"""
        return self.channels[:, -2]

    @property
    def column(self) -> torch.Tensor:
        """[n]"""
        return self.channels[:, -1]


def generate(shape: Shape, length: int, dtype: torch.dtype, seed: int) -> Layer:
    """The same for the same arguments. Memory and time grow with ``length`` alone."""
    g = torch.Generator().manual_seed(seed)
    dim, group = shape.head_dim, shape.heads // shape.kv_heads
    q = torch.empty(length, shape.heads, dim, dtype=dtype)
    k, v = torch.empty(2, length, shape.kv_heads, dim, dtype=dtype)
    needles = []
    for kv_head in range(shape.kv_heads):
        keys = _keys(length, dim, g)
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
        size = math.sqrt(dim / 2)  # two unit vectors a key: elements of about 1
        k[:, kv_head] = size * keys.channels @ rotation + torch.randn(dim, generator=g)
        v[:, kv_head] = torch.randn(length, dim, generator=g)
        for head in range(kv_head * group, (kv_head + 1) * group):
            asked = Features.zeros(length, dim)
            ask, asked.sink[:] = HEADS[head % len(HEADS)]
            ask(asked, keys, g)
            rows, targets = _plant_needles(asked, keys, g)
            needles.append(torch.stack((rows, torch.full_like(rows, head), targets), 1))
            q[:, head] = math.sqrt(dim) / size * asked.channels @ rotation
    return Layer(q, k, v, needles=torch.cat(needles))


def _keys(length: int, dim: int, g: torch.Generator) -> Features:
    keys = Features.zeros(length, dim)
    keys.topic[:] = _topics(keys.topic, g)
    keys.content[:] = _unit(torch.randn(keys.content.shape, generator=g))
    keys.channels[: len(SINKS)] = 0
    keys.sink[: len(SINKS)] = torch.tensor(SINKS)

    # Columns begin at random, ever more seldom, and each is of a length and a worth of its own.
    position = torch.arange(length)
    chance = COLUMNS * COLUMN_GROWTH * (position + 1.0) ** (COLUMN_GROWTH - 1)
    begins = (torch.rand(length, generator=g) < chance) & (position >= NEAR)
    number = begins.cumsum(0)  # 0: none has begun
    tokens = torch.randint(1, COLUMN_TOKENS + 1, (length + 1,), generator=g)
    worth = 1 + 0.05 * torch.randn(length + 1, generator=g)
    since = position - torch.where(begins, position, 0).cummax(0).values
    keys.column[:] = worth[number] * ((number > 0) & (since < tokens[number]))
    return keys


def _topics(like: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Unit vectors whose product falls from 1 to about 0 over TOPIC_TOKENS rows."""
    length, dim = like.shape
    walk = torch.randn(length + TOPIC_TOKENS, dim, generator=g).cumsum(0)
    return _unit(walk[TOPIC_TOKENS:] - walk[:-TOPIC_TOKENS])


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def _own_topic(asked: Features, keys: Features, g: torch.Generator) -> None:
    asked.topic[:] = OWN_TOPIC * keys.topic


def _columns(asked: Features, keys: Features, g: torch.Generator) -> None:
    asked.column[:] = COLUMN


def _diagonal(asked: Features, keys: Features, g: torch.Generator) -> None:
    position = torch.arange(len(keys.content))
    passage = position // PASSAGE
    share = torch.rand(int(passage[-1]) + 1, generator=g)  # of the way back to the first key
    distance = NEAR + (share[passage] * (passage * PASSAGE - NEAR).clamp(min=0)).long()
    asked.content[:] = DIAGONAL * keys.content[(position - distance).clamp(min=0)]


def _other_topics(asked: Features, keys: Features, g: torch.Generator) -> None:
    # The more keys there are, the more of them fit by chance.
    doublings = ((torch.arange(len(asked.topic)) + 1.0) / 16384).log2()
    spread = (OTHER_TOPIC + TOPIC_GROWTH * doublings) * math.sqrt(asked.topic.shape[1])
    asked.topic[:] = spread[:, None] * _topics(asked.topic, g)


# What a head asks for, and what the sink is worth to it.
HEADS: tuple[tuple[Callable[[Features, Features, torch.Generator], None], float], ...] = (
    (_own_topic, 16.5),
    (_columns, 18.0),
    (_diagonal, 18.0),
    (_other_topics, 13.5),
)


def _plant_needles(
    asked: Features, keys: Features, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let some rows of one head ask for a far key, and little else: rows and keys."""
    begin, end = 2 * NEEDLE_DISTANCE, len(keys.content) - NEEDLE_EVERY + 1
    first = torch.arange(begin, max(begin, end), NEEDLE_EVERY)
    first += torch.randint(NEEDLE_EVERY - NEEDLE_ROWS + 1, first.shape, generator=g)
    farthest = first - NEEDLE_DISTANCE
    share = torch.rand(first.shape, generator=g)
    target = len(SINKS) + (share * (farthest - len(SINKS))).long()
    step = torch.arange(NEEDLE_ROWS)
    rows, targets = (first[:, None] + step).flatten(), target.repeat_interleave(NEEDLE_ROWS)
    asked.channels[rows] = 0
    asked.sink[rows] = NEEDLE_SINK
    asked.content[rows] = NEEDLE * keys.content[targets]
    return rows, targets
