"""Who goes where, and why: which layers and which requests are computed dense.

Pure functions over plain numbers: neither torch nor vLLM. The one predicate for a layer is
`why_dense`; dispatch, the counters' labels, `vllm-sparse doctor` and the tests all use it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_sparse_backend.control import Setting


class DenseReason(StrEnum):
    """Why tokens were computed by the base backend; the values are metric labels."""

    # of a request, in one step
    DECODE = "decode"
    SHORT_QUERY = "short_query"
    SHORT_CONTEXT = "short_context"
    REQUEST_OFF = "request_off"  # it asked to be dense, and would not have been
    # of a layer
    SWITCHED_OFF = "switched_off"
    MLA = "mla"
    ENCODER = "encoder"
    CROSS_ATTENTION = "cross_attention"
    NON_CAUSAL = "non_causal"
    MULTIMODAL_PREFIX = "multimodal_prefix"
    SLIDING_WINDOW = "sliding_window"
    CHUNKED_ATTENTION = "chunked_attention"
    OTHER_ATTENTION = "other_attention"
    SINKS = "sinks"
    SOFTCAP = "softcap"
    ALIBI = "alibi"
    KV_SHARING = "kv_sharing"
    DRAFT = "draft"
    CONTEXT_PARALLEL = "context_parallel"
    QUANTIZED_KV = "quantized_kv"
    KV_LAYOUT = "kv_layout"
    DTYPE = "dtype"
    HEAD_DIM = "head_dim"


REQUEST_REASONS = (
    DenseReason.DECODE,
    DenseReason.SHORT_QUERY,
    DenseReason.SHORT_CONTEXT,
    DenseReason.REQUEST_OFF,
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the compiled core computes."""

    head_dims: Collection[int]
    dtypes: Collection[str]  # "bfloat16", ...
    kv_layouts: Collection[str]  # vLLM's ISA strings


@dataclass(frozen=True, slots=True)
class LayerTraits:
    """What decides whether a layer can be computed sparsely. The defaults can."""

    head_dim: int
    dtype: str
    kv_layout: str | None = None  # None: not known yet
    kind: DenseReason | None = None  # the kind of attention, when it is not plain and causal
    sliding_window: bool = False
    sinks: bool = False
    softcap: bool = False
    alibi: bool = False
    kv_sharing: bool = False
    draft: bool = False
    context_parallel: bool = False
    quantized_kv: bool = False


def why_dense(
    layer: LayerTraits, core: Capabilities, *, enabled: bool = True
) -> DenseReason | None:
    """The reason for which all of a layer is computed by the base backend; None: none."""
    flags = {
        DenseReason.DRAFT: layer.draft,
        DenseReason.SLIDING_WINDOW: layer.sliding_window,
        DenseReason.SINKS: layer.sinks,
        DenseReason.SOFTCAP: layer.softcap,
        DenseReason.ALIBI: layer.alibi,
        DenseReason.KV_SHARING: layer.kv_sharing,
        DenseReason.CONTEXT_PARALLEL: layer.context_parallel,
        DenseReason.QUANTIZED_KV: layer.quantized_kv,
        DenseReason.KV_LAYOUT: layer.kv_layout not in (None, *core.kv_layouts),
        DenseReason.DTYPE: layer.dtype not in core.dtypes,
        DenseReason.HEAD_DIM: layer.head_dim not in core.head_dims,
    }
    if not enabled:
        return DenseReason.SWITCHED_OFF
    return layer.kind or next((reason for reason, is_so in flags.items() if is_so), None)


class Run(NamedTuple):
    """Neighbouring requests that are all dense, and the rows that are theirs."""

    first: int  # request
    last: int  # one past the last request
    start: int  # row
    stop: int  # one past the last row


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the requests of one step go, in layers that can be sparse."""

    core: list[int] = field(default_factory=list)  # requests that our core computes, ascending
    scaled: dict[float, list[int]] = field(default_factory=dict)  # of these, by threshold scale
    sparse_tokens: int = 0
    kept_tokens: int = 0  # of those with too short a context: every tile is kept
    dense: list[Run] = field(default_factory=list)  # ascending; empty if `core` is
    dense_tokens: dict[DenseReason, int] = field(default_factory=dict)  # only what occurs
    sparse_requests: int = 0
    kept: list[tuple[int, int]] = field(default_factory=list)  # rows and context of each of those
    dense_requests: dict[DenseReason, int] = field(default_factory=dict)  # as `dense_tokens`

    @property
    def tokens(self) -> int:
        """Query tokens of the step, padding left out."""
        return self.sparse_tokens + self.kept_tokens + sum(self.dense_tokens.values())

    @property
    def calls(self) -> list[tuple[float, list[int]]]:
        """The core's requests by what their thresholds are multiplied with: a call for each, those
        without a scale first."""
        scaled = {r for requests in self.scaled.values() for r in requests}
        plain = [r for r in self.core if r not in scaled]
        return [(1.0, plain)] * bool(plain) + sorted(self.scaled.items())


def make_plan(
    query_start_loc: Sequence[int] | npt.NDArray[np.integer],
    seq_lens: Sequence[int] | npt.NDArray[np.integer],
    *,
    min_query_tokens: int,
    min_prompt_tokens: int,
    core_from: int | None = None,
    prefilling: Sequence[bool] | npt.NDArray[np.bool_] | None = None,
    settings: Sequence[Setting] = (),
) -> Plan:
    """Decide for each of R requests.

    ``query_start_loc`` [R + 1]: first query row of each; ``seq_lens`` [R]: tokens of context
    after this step, the step's own included; ``prefilling`` [R]: whether the step's tokens
    are of the prompt (without it, a single token is taken for decode); ``settings`` [up to R]:
    what the requests ask for, the rest nothing.

    A request is sparse from ``min_query_tokens`` query tokens and ``min_prompt_tokens``
    tokens of context on. With ``core_from`` our core computes it from so many tokens of context
    on, keeping every tile while it is not sparse. Requests without rows are padding and go
    nowhere. The decision about a request depends on this request alone.
    """
    starts = np.asarray(query_start_loc)
    context = np.asarray(seq_lens)
    rows = np.diff(starts)
    decode = rows == 1 if prefilling is None else ~np.asarray(prefilling, dtype=bool)
    short = rows < min_query_tokens
    sparse = ~decode & ~short & (context >= min_prompt_tokens)
    core = sparse.copy()
    if core_from is not None:
        core |= ~decode & ~short & (context >= core_from)
    off = np.zeros_like(core)
    off[: len(settings)] = [setting.off for setting in settings]
    off &= core
    sparse, core = sparse & ~off, core & ~off
    reasons = {
        DenseReason.DECODE: decode,
        DenseReason.SHORT_QUERY: ~decode & short,
        DenseReason.SHORT_CONTEXT: ~decode & ~short & ~core & ~off,
        DenseReason.REQUEST_OFF: off,
    }
    dense_tokens = {
        reason: tokens for reason, these in reasons.items() if (tokens := int(rows[these].sum()))
    }
    dense_requests = {
        reason: int(np.count_nonzero(rows[these]))
        for reason, these in reasons.items()
        if reason in dense_tokens
    }
    if not core.any():
        return Plan(dense_tokens=dense_tokens, dense_requests=dense_requests)
    kept = core & ~sparse
    scaled: dict[float, list[int]] = {}
    for r, setting in enumerate(settings):
        if sparse[r] and setting.threshold_scale != 1:
            scaled.setdefault(setting.threshold_scale, []).append(r)
    return Plan(
        core=np.flatnonzero(core).tolist(),
        scaled=scaled,
        sparse_tokens=int(rows[sparse].sum()),
        kept_tokens=int(rows[kept].sum()),
        dense=_runs(starts, ~core),
        dense_tokens=dense_tokens,
        sparse_requests=int(np.count_nonzero(sparse)),
        kept=list(zip(rows[kept].tolist(), context[kept].tolist(), strict=True)),
        dense_requests=dense_requests,
    )


def _runs(starts: npt.NDArray[np.integer], dense: npt.NDArray[np.bool_]) -> list[Run]:
    """The maximal runs of neighbouring dense requests that have rows."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], dense, [False])).astype(np.int8)))
    runs = []
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if starts[first] < starts[last]:
            runs.append(Run(first, last, int(starts[first]), int(starts[last])))
    return runs
