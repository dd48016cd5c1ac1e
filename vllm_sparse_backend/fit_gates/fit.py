"""Teaches one layer's gates, all its heads at a time, by gradient descent."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch

from vllm_sparse_backend.fit_gates.lessons import Lesson
from vllm_sparse_backend.selection.gates import Gates, Rotation

RATE, DECAY = 0.006, 0.3  # AdamW's; the rate at first
TOGETHER = 2  # documents of a step
LEFT_OUT = 4  # of a document's rows of blocks the first one in so many is not learned from


def untaught(heads: int, dim: int, rotation: Rotation) -> Gates:
    """Gates that compare the mean query with the mean key."""
    eye = torch.eye(dim).expand(heads, -1, -1)
    zeros = torch.zeros(heads, 2 * dim, dim)
    return Gates(eye.clone(), torch.cat((zeros, eye), 1), rotation)


def divergence(gates: Gates, lessons: Sequence[Lesson]) -> torch.Tensor:
    """Kullback-Leibler, of the attention from the gates' softmax: nats, the mean over rows of
    blocks and documents [H]. As in SeerAttention the first quarter of a document is left out."""
    found = []
    for lesson in lessons:
        group = len(lesson.queries) // len(lesson.keys)
        keys = lesson.keys.repeat_interleave(group, 0)
        logits = gates.logits(lesson.queries, keys)
        later = logits.isneginf()
        share = logits.log_softmax(2).masked_fill(later, 0.0)
        target = lesson.target
        each = (torch.xlogy(target, target) - target * share).sum(2)  # [H, n]
        found.append(each[:, each.shape[1] // LEFT_OUT :].mean(1))
    return torch.stack(found).mean(0)


def taught(
    gates: Gates, lessons: Sequence[Lesson], steps: int, seed: int, advance: Callable[[], None]
) -> Gates:
    """The gates after so many steps, on lessons drawn by ``seed``; ``advance`` is called after
    each step."""
    q, k = (weight.clone().requires_grad_() for weight in (gates.q, gates.k))
    optimizer = torch.optim.AdamW((q, k), lr=RATE, weight_decay=DECAY)
    rng = random.Random(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        drawn = rng.sample(lessons, min(TOGETHER, len(lessons)))
        optimizer.zero_grad()
        divergence(Gates(q, k, gates.rotation), drawn).sum().backward()
        optimizer.step()
        advance()
    return Gates(q.detach(), k.detach(), gates.rotation)
