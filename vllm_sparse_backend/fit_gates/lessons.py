"""What gates are taught: a model's pooled queries and keys, and its true attention by blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vllm_sparse_backend.backend.observe import Call
from vllm_sparse_backend.selection.gates import (
    BLOCK,
    Rotation,
    pooled_keys,
    pooled_queries,
)

SLICE = 8 * BLOCK  # rows whose scores there are at a time


@dataclass(frozen=True, eq=False)
class Lesson:
    """Of one layer and document with n blocks."""

    queries: torch.Tensor  # [H, n, D], pooled
    keys: torch.Tensor  # [Hkv, n, 3 D], pooled
    target: torch.Tensor  # [H, n, n]: a row sums to 1


class Teacher:
    """Of one document; called before each layer's attention of each step (`observe.observing`).

    Steps begin at multiples of 64. ``advance`` is called after each layer of each step.
    """

    def __init__(self, rotations: Mapping[int, Rotation], advance: Callable[[], None]) -> None:
        self._rotations, self._advance = rotations, advance
        self._queries: dict[int, list[torch.Tensor]] = {}
        self._targets: dict[int, list[torch.Tensor]] = {}
        self._keys: dict[int, torch.Tensor] = {}

    def __call__(self, call: Call) -> None:
        q, (k, _) = call.rows().transpose(0, 1), call.keys_values()  # [H, T, D], [S, Hkv, D]
        k = k.transpose(0, 1)
        rotation, offset = self._rotations[call.layer], k.shape[1] - q.shape[1]
        own = self._queries.setdefault(call.layer, [])
        own.append(pooled_queries(q, offset, rotation))
        # Of all keys so far; those of the last step are of all.
        self._keys[call.layer] = torch.stack([pooled_keys(each, rotation) for each in k])
        targets = self._targets.setdefault(call.layer, [])
        targets.append(pooled_attention(q, k, call.scale))
        self._advance()

    def lessons(self) -> dict[int, Lesson]:
        """By layer."""
        found = {}
        for layer, keys in self._keys.items():
            queries = torch.cat(self._queries[layer], 1)
            target = torch.zeros(len(queries), queries.shape[1], keys.shape[1])
            first = 0
            for part in self._targets[layer]:
                target[:, first : first + part.shape[1], : part.shape[2]] = part
                first += part.shape[1]
            found[layer] = Lesson(queries, keys, target)
        return found


@torch.no_grad()
def pooled_attention(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """The largest weight in each block of 64 rows and 64 keys, over the sum of such in the rows
    of blocks: fp32 [H, blocks of rows, blocks of keys].

    ``q`` [H, T, D] are the last T of the positions of ``k`` [Hkv, S, D], from a multiple of 64 on.
    """
    rows, length = q.shape[1], k.shape[1]
    offset, missing = length - rows, -length % BLOCK
    position = torch.arange(length)
    found = []
    for head, queries in enumerate(q):
        keys, parts = k[head * len(k) // len(q)].float(), []
        for begin in range(0, rows, SLICE):
            at = position[offset + begin :][:SLICE, None]
            scores = scale * queries[begin : begin + SLICE].float() @ keys.T
            weight = scores.masked_fill_(position > at, -torch.inf).softmax(1)
            weight = torch.nn.functional.pad(weight, (0, missing, 0, -len(at) % BLOCK))
            blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
            parts.append(blocks.amax((1, 3)))
        found.append(torch.cat(parts))
    best = torch.stack(found)
    return best / best.sum(2, keepdim=True)
