"""Looks on while vLLM reads a document, and measures sampled q blocks of every layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from vllm_sparse_backend.backend.observe import Call
from vllm_sparse_backend.calibrate.candidates import LADDERS, Ladder
from vllm_sparse_backend.calibrate.measure import BY_LADDER, LayerRecord, Sums, of_step
from vllm_sparse_backend.calibrate.table import Group, Part
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.ops import paged_sparse_attention
from vllm_sparse_backend.selection import DENSE


class Recorder:
    """Of one document; called before each layer's attention of each step (`observe.observing`).

    ``starts``: of the q blocks to measure (`measure.sampled`); steps that have none of them take no
    longer. ``advance`` is called after each layer of each step. With ``ladders`` of list selectors,
    whose time no cost model knows, the core is timed with every tile kept on the same step.
    ``prompt``: tokens of the document.
    """

    def __init__(
        self,
        group: Group,
        config: SparseConfig,
        starts: Collection[int],
        prompt: int,
        advance: Callable[[], None],
        ladders: Sequence[Ladder] = LADDERS,
    ) -> None:
        self._ladders, self._prompt = ladders, prompt
        self._listed = any(ladder.listed for ladder in ladders)
        self._keep_all: dict[int, float] = defaultdict(float)  # seconds, by layer
        self._steps: dict[int, int] = defaultdict(int)  # measured, by layer
        self._group, self._config, self._starts = group, config, frozenset(starts)
        self._advance = advance
        self._layers: dict[int, LayerRecord] = {}

    def __call__(self, call: Call) -> None:
        q, context = call.rows(), int(call.seq_lens[0])
        blocks = of_step(self._starts, len(q), context)
        if blocks and self._is_sparse(len(q), context):
            if call.layer not in self._layers:
                self._layers[call.layer] = LayerRecord(q.shape[1], self._ladders, call.layer)
            k, v = call.keys_values()
            self._layers[call.layer].add(q, k, v, call.scale, blocks, self._prompt)
            self._steps[call.layer] += 1
            if self._listed:
                self._keep_all[call.layer] += _keep_all_seconds(call)
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
            select=_stacked(sums, "select"),
            keep_all=np.array([self._keep_all[layer] for layer in self.layers()]),
            steps=max(self._steps.values()),  # the same in every layer
        )

    def _is_sparse(self, rows: int, context: int) -> bool:
        """Whether a server would follow a policy in this step."""
        config = self._config
        return rows >= config.min_query_tokens and context >= config.min_prompt_tokens


def _keep_all_seconds(call: Call) -> float:
    began = time.perf_counter()
    paged_sparse_attention(
        call.q, call.kv_cache, call.block_table, call.query_start_loc, call.seq_lens, DENSE,
        scale=call.scale, requests=[0], kv_layout=call.kv_layout,
    )  # fmt: skip
    return time.perf_counter() - began


def _stacked(sums: list[Sums], name: str) -> list[np.ndarray]:
    ladders = range(len(getattr(sums[0], name)))
    return [np.stack([getattr(its, name)[n] for its in sums]) for n in ladders]
