"""Products of queries and keys as fast as the machine multiplies what they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def of_these(q: torch.Tensor, k: torch.Tensor) -> Iterator[None]:
    """Inside, products of fp32 copies of (parts of) these two may be made by bf16 instructions, if
    bf16 is what both are; of nothing else.

    The product of two bf16 numbers is exact in fp32, and those instructions sum up in fp32 as well:
    nothing is lost, and they are more than twice as fast.
    """
    if not q.dtype == k.dtype == torch.bfloat16 or q.device.type != "cpu":
        yield
        return
    # What fp32 matrices are rounded to, where the machine can.
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


class Scratch:
    """Memory for what is made over and over and soon forgotten: pages that the system has to find
    anew each time cost more than the products that fill them."""

    def __init__(self, device: torch.device) -> None:
        self._held = torch.empty(0, dtype=torch.float32, device=device)

    def empty(self, *shape: int) -> torch.Tensor:
        """fp32, of any content; overwritten by the next one."""
        size = math.prod(shape)
        if size > len(self._held):
            self._held = torch.empty(size, dtype=torch.float32, device=self._held.device)
        return self._held[:size].view(shape)
