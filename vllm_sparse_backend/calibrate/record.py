"""Looks on while vLLM reads a document, and measures sampled q blocks of every layer."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from vllm_sparse_backend.backend.observe import Call
from vllm_sparse_backend.calibrate.measure import BY_LADDER, LayerRecord, Sums, sampled
from vllm_sparse_backend.calibrate.table import Group, Part
from vllm_sparse_backend.config import SparseConfig


class Recorder:
    """Of one document; called before each layer's attention of each step (`observe.observing`).

    ``blocks``: q blocks measured of a whole document of ``length`` tokens, evenly over its steps;
    which ones, ``seed`` says. ``advance`` is called after each layer of each step.
    """

    def __init__(
        self,
        group: Group,
        config: SparseConfig,
        blocks: int,
        seed: str,
        advance: Callable[[], None],
    ) -> None:
        self._group, self._config, self._blocks = group, config, blocks
        self._seed, self._advance = seed, advance
        self._layers: dict[int, LayerRecord] = {}

    def __call__(self, call: Call) -> None:
        q, context = call.rows(), int(call.seq_lens[0])
        if self._is_sparse(len(q), context):
            rng = random.Random(f"{self._seed} {context}")  # the same blocks in every layer
            count = max(1, round(self._blocks * len(q) / self._group.length))
            record = self._layers.setdefault(call.layer, LayerRecord(q.shape[1]))
            k, v = call.keys_values()
            record.add(q, k, v, call.scale, sampled(len(q), context, count, rng))
        self._advance()

    def layers(self) -> list[int]:
        """Those that have been seen, ascending."""
        return sorted(self._layers)

    def part(self) -> Part:
        """What was measured. Raises ValueError if that is nothing."""
        sums = [self._layers[layer].sums() for layer in self.layers()]
        if not sums:
            raise ValueError("no layer was measured")
        first = sums[0]
        return Part(
            self._group,
            first.octaves,
            np.stack([its.size for its in sums]),
            first.rows,
            first.causal,
            **{name: _stacked(sums, name) for name in BY_LADDER},
        )

    def _is_sparse(self, rows: int, context: int) -> bool:
        """Whether a server would follow a policy in this step."""
        config = self._config
        return rows >= config.min_query_tokens and context >= config.min_prompt_tokens


def _stacked(sums: list[Sums], name: str) -> list[np.ndarray]:
    ladders = range(len(getattr(sums[0], name)))
    return [np.stack([getattr(its, name)[n] for its in sums]) for n in ladders]
