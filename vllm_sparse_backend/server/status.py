"""What ``/sparse_prefill/status`` answers: types, and how they are filled from the counters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from vllm_sparse_backend.backend.plan import DenseReason
from vllm_sparse_backend.metrics.counters import (
    ATTEND,
    CAUSAL,
    COMPUTED,
    DENSE_ESTIMATE,
    LAYER_DECISIONS,
    LAYER_TOKENS,
    SELECT,
    Totals,
)

MEANINGS = {
    "": "by the policies of the profile",
    DenseReason.DECODE: "tokens are being generated; decode is always dense",
    DenseReason.SHORT_QUERY: "the step had fewer tokens of the request than min_query_tokens",
    DenseReason.SHORT_CONTEXT: "the context is still shorter than min_prompt_tokens",
    DenseReason.REQUEST_OFF: "the request asked for it (vllm_xargs)",
    DenseReason.SWITCHED_OFF: "enabled is false",
    DenseReason.MLA: "layers with multi-head latent attention",
    DenseReason.ENCODER: "layers of an encoder",
    DenseReason.CROSS_ATTENTION: "layers with cross attention",
    DenseReason.NON_CAUSAL: "attention that is not causal",
    DenseReason.MULTIMODAL_PREFIX: "multimodal prefixes, which are attended to from both sides",
    DenseReason.SLIDING_WINDOW: "layers with a sliding window, which are sparse by nature",
    DenseReason.CHUNKED_ATTENTION: "layers with chunked local attention",
    DenseReason.OTHER_ATTENTION: "layers or steps of a kind that is not known here",
    DenseReason.SINKS: "layers with learned attention sinks",
    DenseReason.SOFTCAP: "layers that cap their attention scores",
    DenseReason.ALIBI: "layers with ALiBi",
    DenseReason.KV_SHARING: "layers that use another layer's keys and values",
    DenseReason.DRAFT: "layers of a draft model",
    DenseReason.CONTEXT_PARALLEL: "context parallelism",
    DenseReason.QUANTIZED_KV: "a quantized KV cache",
    DenseReason.KV_LAYOUT: "a layout of the KV cache that the core does not read",
    DenseReason.DTYPE: "a dtype that the core does not compute in",
    DenseReason.HEAD_DIM: "a head_dim that the core does not compute",
}
KEPT = "too short to be sparse; by this package's core, every tile kept, which is faster"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Unauthorized(_Part):
    """As vLLM answers without the server's API key."""

    error: str


class Served(_Part):
    """What the server was started with."""

    model: str
    version: str = Field(description="of vllm-sparse-backend")
    runs: str = Field(description="the line that the server says at its start")
    platform: str
    isa: str = Field(description="instruction set of the CPU core, or triton")
    profile: str = Field(description="its name, or uniform")
    digest: str = Field(description="of the profile; empty without one")
    shipped: bool = Field(description="the profile came with the package")
    min_prompt_tokens: int
    min_query_tokens: int
    warnings: list[str]


class PathCount(_Part):
    """Query tokens that went one way."""

    path: str = Field(description="sparse, keep_all or dense")
    reason: str = Field(description="why not sparse; empty where sparse")
    meaning: str
    layer_tokens: int = Field(description="query tokens times layers")
    layer_decisions: int = Field(description="requests of a step times layers")


class Tiles(_Part):
    """Of all that the core computed; key tiles of 16 times query heads."""

    computed: int
    causal: int = Field(description="what dense attention would have computed")
    density: float | None = Field(description="computed / causal; null before anything ran")


class Heads(_Part):
    """Of sparse requests, by layer and query head over the whole model; causal 0: no sparse
    request so far, or a layer that is always dense."""

    layers: int
    heads: int
    density: list[float | None] = Field(description="of each layer")
    computed: list[list[int]] = Field(description="[layers][heads], key tiles of 16")
    causal: list[list[int]]


class Seconds(_Part):
    """Of attention to what the core computed, summed over threads and workers."""

    select: float
    attend: float
    dense_estimate: float = Field(description="what vLLM's CPU attention would have taken")
    saved: float = Field(description="dense_estimate - select - attend")


class Expected(_Part):
    """A density that the profile's calibration came to."""

    tokens: int = Field(description="of context")
    density: float


class Status(_Part):
    """What is sparse on this server. Counters grow from the server's start."""

    active: bool
    why_not: str | None = Field(description="why nothing can be sparse; null where active")
    served: Served | None = Field(description="null where the backend is not in use")
    workers: int = Field(description="that there were on this machine, those gone included")
    unreadable: int = Field(description="counters' files that could not be read")
    paths: list[PathCount] = Field(description="most tokens first; those without tokens left out")
    tiles: Tiles
    heads: Heads
    seconds: Seconds | None = Field(description="null where time is not taken: on GPUs")
    expected: list[Expected] = Field(description="empty where the profile says nothing of it")


def fill(served: Served | None, why_not: str | None, totals: Totals) -> Status:
    """The status from what is served and the counters of all workers."""
    values = totals.values
    computed, causal = (int(values.get(key, 0)) for key in (COMPUTED, CAUSAL))
    return Status(
        active=why_not is None,
        why_not=why_not,
        served=served,
        workers=totals.workers,
        unreadable=totals.unreadable,
        paths=_paths(totals),
        tiles=Tiles(computed=computed, causal=causal, density=_ratio(computed, causal)),
        heads=_heads(totals),
        seconds=_seconds(totals),
        expected=[
            Expected(tokens=int(tokens), density=density)
            for tokens, density in totals.expected.items()
        ],
    )


def _paths(totals: Totals) -> list[PathCount]:
    decisions = dict(totals.of(LAYER_DECISIONS))
    found = [
        PathCount(
            path=path,
            reason=reason,
            meaning=KEPT if path == "keep_all" else MEANINGS.get(reason, ""),
            layer_tokens=int(tokens),
            layer_decisions=int(decisions.get((path, reason), 0)),
        )
        for (path, reason), tokens in totals.of(LAYER_TOKENS)
        if tokens
    ]
    return sorted(found, key=lambda path: -path.layer_tokens)


def _heads(totals: Totals) -> Heads:
    computed, causal = totals.tiles
    pairs = zip(computed.sum(1).tolist(), causal.sum(1).tolist(), strict=True)
    return Heads(
        layers=causal.shape[0],
        heads=causal.shape[1],
        density=[_ratio(*pair) for pair in pairs],
        computed=computed.astype(int).tolist(),
        causal=causal.astype(int).tolist(),
    )


def _seconds(totals: Totals) -> Seconds | None:
    select, attend, dense = (
        totals.values.get(key, 0.0) for key in (SELECT, ATTEND, DENSE_ESTIMATE)
    )
    if not dense:
        return None
    return Seconds(
        select=select, attend=attend, dense_estimate=dense, saved=dense - select - attend
    )


def _ratio(computed: float, causal: float) -> float | None:
    return computed / causal if causal else None
