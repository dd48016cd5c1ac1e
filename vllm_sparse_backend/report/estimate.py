"""A prediction for a model by name: its configuration through vLLM, its profile, and the notes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.doctor import configuration, quiet
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import ModelFacts, load_profile
from vllm_sparse_backend.report.measured import Found, find
from vllm_sparse_backend.report.prediction import (
    Row,
    Subject,
    break_even,
    count_policies,
    layer_parameters,
    predict,
)
from vllm_sparse_backend.selection import ListSelector

if TYPE_CHECKING:
    from vllm_sparse_backend.backend.plan import DenseReason

CHUNK_TOKENS = 2048  # vLLM's default for a server on CPUs


class Estimate(BaseModel):
    """What `vllm-sparse estimate --json` prints."""

    model_config = ConfigDict(frozen=True)

    model: str
    facts: ModelFacts
    policies: str  # the profile, or what stands for one
    isa: str
    dtype: str
    threads: int
    chunk_tokens: int
    positions: int  # that the model has
    parameters: int  # of the layers, an estimate
    matmul_rate: float  # 1e9 operations a second, of one thread
    matmul_measured: bool
    density_from: str
    sparse_layers: int
    dense_layers: dict[str, int]  # by reason
    core_from: int  # tokens from which on the core with every tile kept is faster than CPU_ATTN
    break_even: int | None  # tokens from which on policies are faster than keeping every tile
    listed: list[str] = []  # list selectors among the policies
    rows: list[Row]

    def title(self) -> str:
        """What was predicted for."""
        return f"{self.model}, {self.isa}, {self.dtype}, threads: {self.threads}"

    def notes(self) -> list[str]:
        """What the figures rest on, a line each."""
        pays = (
            "Following the policies pays at no length."
            if self.break_even is None
            else f"Following the policies pays from {self.break_even:,} tokens on"
            f" (every tile kept, the core beats CPU_ATTN from {self.core_from:,} on)."
        )
        dense = ", ".join(f"{count} {reason}" for reason, count in self.dense_layers.items())
        rate = "measured" if self.matmul_measured else "predicted"
        lines = [
            pays,
            f"Policies: {self.policies}.",
            f"Density: {self.density_from}.",
            f"Layers: {self.sparse_layers} can be sparse"
            + (f", dense by CPU_ATTN: {dense}." if dense else "."),
            f"TTFT is attention and matrix products: an estimate of "
            f"{self.parameters / 1e6:,.0f} million weights in Llama-like blocks at "
            f"{self.matmul_rate:g} GFLOP/s a thread ({rate}), chunks of {self.chunk_tokens}.",
        ]
        if self.listed:
            lines.append(
                f"List selectors ({', '.join(self.listed)}): attention only, at the expected "
                "density; what choosing tiles takes is not known, and not in these figures."
            )
        beyond = [row.length for row in self.rows if row.length > self.positions]
        if beyond:
            lines.append(
                f"The model has {self.positions:,} positions: prompts from {beyond[0]:,} tokens on "
                "need its RoPE scaled."
            )
        return lines


def make_estimate(
    model: str,
    profile: Path | None,
    lengths: list[int],
    *,
    isa: str | None = None,
    threads: int = 1,
    dtype: str = "auto",
) -> Estimate:
    """Predict. Raises Refused and SparsePrefillError; the message says what to change."""
    if isa is not None and isa not in cost.RATES:
        raise Refused(f"--isa: want one of {', '.join(cost.RATES)}, got {isa!r}")
    if profile is not None:
        load_profile(profile)  # its errors before vLLM's
    with quiet():
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # or vLLM does not know the backend
        vllm_config = configuration(model, None if profile is None else str(profile))
        from vllm_sparse_backend.backend import expect, start

        setup = start.resolve(vllm_config)
        reasons = expect.reasons(vllm_config, start.capabilities(), enabled=True)
        facts = start.facts_of(vllm_config.model_config)
    if profile is None or setup.profile is None:
        found = Found(Path(), None, "there is no measurement of these policies")
    else:
        found = find(setup.profile, profile)
    text = vllm_config.model_config.hf_text_config
    subject = _subject(setup, found, reasons, facts, text, isa or setup.isa, dtype, threads)
    dense = Counter(str(reason) for reason in reasons if reason)
    return Estimate(
        model=Path(model).name if Path(model).is_dir() else model,
        facts=facts,
        policies=setup.policies(),
        isa=subject.isa,
        dtype=subject.dtype,
        threads=threads,
        chunk_tokens=subject.chunk_tokens,
        positions=int(getattr(text, "max_position_embeddings", None) or max(lengths)),
        parameters=subject.parameters,
        matmul_rate=cost.RATES[subject.isa].matmul[subject.dtype],
        matmul_measured=(subject.isa, subject.dtype) in cost.MATMUL_MEASURED,
        density_from=origin(found),
        sparse_layers=subject.sparse_layers,
        dense_layers=dict(dense),
        core_from=cost.core_wins_from(subject.isa, facts.num_heads, facts.head_dim),
        break_even=break_even(subject),
        listed=sorted({it.selector for it in subject.policies if isinstance(it, ListSelector)}),
        rows=[predict(subject, length) for length in lengths],
    )


def _subject(
    setup: Any,
    found: Found,
    reasons: list[DenseReason | None],
    facts: ModelFacts,
    text: Any,
    isa: str,
    dtype: str,
    threads: int,
) -> Subject:
    if dtype == "auto":
        dtype = "float32" if isa == "avx2" else "bfloat16"
    policies = count_policies(
        [setup.uniform] * facts.num_heads
        if setup.profile is None
        else setup.profile.for_layer(layer)
        for layer, reason in enumerate(reasons)
        if reason is None
    )
    window = getattr(text, "sliding_window", None)
    return Subject(
        facts=facts,
        isa=isa,
        dtype=dtype,
        threads=threads,
        chunk_tokens=CHUNK_TOKENS,
        min_prompt_tokens=setup.config.min_prompt_tokens,
        parameters=layer_parameters(text, facts),
        policies=policies,
        windows=[window if r == "sliding_window" else None for r in reasons if r],
        measurement=found.measurement,
    )


def origin(found: Found) -> str:
    """Where densities are from, and how far that goes."""
    measurement = found.measurement
    if measurement is None:
        return (
            f"expected, {cost.EXPECTED_KEPT:g} of the tiles beyond sink and window "
            f"({found.why_not})"
        )
    first, last = min(measurement.lengths), max(measurement.lengths)
    return f"measured from {first:,} to {last:,} tokens, beyond that as there ({found.path.name})"
