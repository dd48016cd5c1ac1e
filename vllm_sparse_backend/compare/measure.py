"""Times and errors of settings on one layer of a prompt, beside dense attention, in turn.

The prompt is computed in the chunks in which a server computed it. In every chunk every setting
first runs once to be judged, which also warms it up; then all of a round run one after the other,
dense among them, over and over, so that a noisy machine is noisy for all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.calibrate.measure import of_step, sampled
from vllm_sparse_backend.compare.layer import Layer
from vllm_sparse_backend.compare.methods import Setting
from vllm_sparse_backend.compare.ours import Ours
from vllm_sparse_backend.compare.truth import Judged, Truth, figures
from vllm_sparse_backend.compat_attention import PAGE, CpuAttention, why_no_cpu_attention
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.ops import PolicyTable, layout
from vllm_sparse_backend.ops.cpu import core, cost
from vllm_sparse_backend.ops.policies import Place, tile_size
from vllm_sparse_backend.ops.tiles import QBlock
from vllm_sparse_backend.selection import DENSE

CPU_ATTN, KEEP_ALL = "CPU_ATTN", "this package's core, every tile kept"


class Measured(BaseModel):
    """One setting in one layer at one length. Lists have a number for every repetition: seconds of
    the whole prompt, by the clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: list[float]
    dense: list[float]  # of dense attention in the same round
    base: str  # what that was
    select: list[float]  # of `seconds`, choosing tiles; what is prepared for that included
    error: float  # `truth.Figures`
    tail: float
    recall: float
    worst_recall: float
    computed: int  # keys of computed tiles, summed over heads and q blocks
    causal: int


@dataclass(frozen=True)
class How:
    """What a measurement is made with."""

    repeats: int
    blocks: int  # q blocks of a prompt that are judged
    seed: int


def judged_blocks(how: How, length: int) -> list[int]:
    """Where the q blocks of a prompt start that are judged: the same in every layer."""
    return sampled(length, how.blocks, f"{how.seed} {length}")


@dataclass
class _Collected:
    seconds: list[float]
    select: list[float]
    judged: list[Judged] = field(default_factory=list)
    computed: int = 0
    causal: int = 0


def why_not_cpu_attn(layer: Layer) -> str | None:
    """Why dense attention is not CPU_ATTN's for a layer; None: it is."""
    reason = why_no_cpu_attention()
    if reason is None and (its := CpuAttention(layer.k[:1], layer.v[:1])).kv_layout not in (
        core.KV_LAYOUTS
    ):
        return f"its cache layout here, {its.kv_layout}, is one that the core does not read"
    return reason


class Bench:
    """One layer's keys and values in a cache that all contenders share, and its chunks.

    ``number``: of the layer in the model; ``ends``: where each chunk of the prompt ends.
    """

    def __init__(self, layer: Layer, number: int, ends: Sequence[int], how: How) -> None:
        self._layer, self._number, self._ends, self._how = layer, number, list(ends), how
        self._base: CpuAttention | None = None
        if why_not_cpu_attn(layer) is None:
            self._base = CpuAttention(layer.k, layer.v)
            self._cache, self._layout = self._base.kv_cache, self._base.kv_layout
        else:
            self._layout = "vec"
            self._cache = layout.pack(layer.k, layer.v, self._layout, PAGE)

    @property
    def dense(self) -> str:
        """What dense attention is here."""
        return KEEP_ALL if self._base is None else CPU_ATTN

    def round(self, settings: Sequence[Setting]) -> list[Measured]:
        """Measure the settings, in turn with dense attention."""
        repeats = self._how.repeats
        tables = [self._table(setting) for setting in settings]
        collected = [_Collected([0.0] * repeats, [0.0] * repeats) for _ in settings]
        dense = [0.0] * repeats
        start = 0
        for end in self._ends:
            self._step(self._layer.step(start, end), tables, collected, dense)
            start = end
        return [self._measured(its, dense) for its in collected]

    def _table(self, setting: Setting) -> PolicyTable:
        """As a server has it: a head's policy is followed from the context on where it pays."""
        heads, dim = self._layer.q.shape[1:]
        rows = setting.rows(self._number, heads)
        least, isa = SparseConfig().min_prompt_tokens, core.active_isa()
        from_ = [cost.followed_from(isa, policy, dim, least) for policy in rows]
        return PolicyTable(rows, from_, Place(self._number, 0, heads))

    def _step(
        self,
        step: Layer,
        tables: Sequence[PolicyTable],
        collected: Sequence[_Collected],
        dense: list[float],
    ) -> None:
        out = torch.empty_like(step.q)
        ours = [Ours(step, table, self._cache, self._layout, out=out) for table in tables]
        truth = Truth(step, self._sampled(step))
        threads = torch.get_num_threads()
        for its, table, own in zip(collected, tables, ours, strict=True):
            made, subtiles = own.with_tiles()
            if truth.blocks:
                its.judged.append(truth.judge(made, subtiles))
            sizes = [tile_size(policy) for policy in table.rows]
            (stats,) = own.stats
            its.computed += _keys(stats.tiles_computed, sizes)
            its.causal += _keys(stats.tiles_causal, sizes)
        base = self._dense(step, out)
        base()
        turns = [*range(len(ours)), None]
        for repeat in range(self._how.repeats):
            # Whose turn comes behind whose changes, since one leaves the caches to the next.
            for turn in turns[repeat % len(turns) :] + turns[: repeat % len(turns)]:
                began = time.perf_counter()
                if turn is None:
                    base()
                    dense[repeat] += time.perf_counter() - began
                    continue
                ours[turn]()
                collected[turn].seconds[repeat] += time.perf_counter() - began
                stats = ours[turn].stats[-1]
                collected[turn].select[repeat] += (
                    stats.pack_seconds + stats.select_seconds
                ) / threads

    def _sampled(self, step: Layer) -> list[QBlock]:
        starts = judged_blocks(self._how, len(self._layer.k))
        return of_step(starts, len(step.q), len(step.k))

    def _dense(self, step: Layer, out: torch.Tensor) -> Callable[[], object]:
        if (base := self._base) is not None:
            return lambda: base(step.q, len(step.k), step.softmax_scale, out)
        table = PolicyTable([DENSE] * step.q.shape[1])
        return Ours(step, table, self._cache, self._layout, out=out)

    def _measured(self, its: _Collected, dense: list[float]) -> Measured:
        return Measured(
            seconds=its.seconds,
            dense=dense,
            base=self.dense,
            select=its.select,
            **figures(its.judged)._asdict(),
            computed=its.computed,
            causal=its.causal,
        )


def _keys(tiles: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(tiles, sizes, strict=True))
