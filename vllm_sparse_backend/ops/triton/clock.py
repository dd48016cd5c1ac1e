"""How long a call's phases took, on the device; nothing waits before it is asked."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks on the stream; a phase ends where the next mark stands."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """What is launched from here on belongs to ``phase``."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:  # an interpreter, which is done when it returns
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase, summed over its marks. Waits for the device."""
        self.mark("")
        if self._device.type == "cuda":
            self._marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            took = begin.elapsed_time(end) / 1000 if hasattr(begin, "elapsed_time") else end - begin
            total[phase] = total.get(phase, 0.0) + took
        return total
