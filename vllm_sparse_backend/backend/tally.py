"""Tiles that a GPU counts, read without ever waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_sparse_backend.backend.worker import subtiles_of
from vllm_sparse_backend.ops import PolicyTable


class Event(Protocol):
    """What is used of a torch.cuda.Event."""

    def record(self) -> None:
        """Mark this point of the stream."""

    def query(self) -> bool:
        """Whether the device has come past it."""


class TileTally:
    """Running sums of the tiles that each head of each layer has computed.

    The sums stay on the device. After the last layer of a step they are copied, asynchronously;
    `take` reads a copy that has arrived, at the next step or a later one. Sums only grow, so that
    a copy that was skipped is made good by the next one. ``event``: None on a CPU, where sums can
    be read at any time.
    """

    def __init__(
        self, tables: Mapping[str, PolicyTable], device: torch.device, event: Event | None
    ) -> None:
        self._places: dict[str, slice] = {}
        weights: list[int] = []
        for name, table in tables.items():
            self._places[name] = slice(len(weights), len(weights) + len(table.rows))
            weights += subtiles_of(table)
        self._weights = np.array(weights, dtype=np.int64)
        self._sums = torch.zeros(len(weights), dtype=torch.int64, device=device)
        self._event = event
        pinned = torch.zeros(len(weights), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._host = self._sums if event is None else pinned
        self._last = next(reversed(self._places), None)
        self._taken = np.zeros_like(self._weights)
        self._on_its_way = self._behind = False

    def add(self, layer: str, tiles: torch.Tensor) -> None:
        """What one layer computed in this step: int64 [Hq], on the device."""
        self._sums[self._places[layer]].add_(tiles)
        if layer == self._last:
            self._copy()

    def take(self) -> dict[str, npt.NDArray[np.int64]]:
        """Tiles that have arrived since the last call: by layer, of each head [Hq], in units of
        `SUBTILE` keys; without layers that have none.
        """
        if self._event is not None:
            if not (self._on_its_way and self._event.query()):
                return {}
            self._on_its_way = False
        total = self._host.numpy() * self._weights
        new, self._taken = total - self._taken, total
        if self._behind:
            self._copy()
        if not new.any():
            return {}
        layers = {name: new[place] for name, place in self._places.items()}
        return {name: tiles for name, tiles in layers.items() if tiles.any()}

    def _copy(self) -> None:
        if self._event is None:
            return
        # One at a time: were each step to start another, none might ever be found complete.
        self._behind = self._on_its_way
        if not self._on_its_way:
            self._host.copy_(self._sums, non_blocking=True)
            self._event.record()
            self._on_its_way = True
