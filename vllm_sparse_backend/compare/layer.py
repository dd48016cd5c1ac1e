"""What attention is computed of: one layer's queries, keys and values, whole or by steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layer:
    """The last T of S positions of a prompt; T = S of a whole one."""

    q: torch.Tensor  # [T, Hq, D]
    k: torch.Tensor  # [S, Hkv, D]
    v: torch.Tensor  # [S, Hkv, D]
    prompt_len: int | None = None  # of the prompt of which this is a part; None: S
    scale: float | None = None  # of q·k; None: D ** -0.5

    @property
    def offset(self) -> int:
        """The position of the first row: S - T."""
        return len(self.k) - len(self.q)

    @property
    def group(self) -> int:
        """q heads of a kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def softmax_scale(self) -> float:
        """Of q·k."""
        return float(self.q.shape[2] ** -0.5) if self.scale is None else self.scale

    def step(self, start: int, end: int) -> Layer:
        """The rows from ``start`` to ``end`` of a whole prompt, and the keys they may see."""
        return Layer(self.q[start:end], self.k[:end], self.v[:end], len(self.k), self.scale)
