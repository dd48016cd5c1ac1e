"""A prediction for a model by name: its configuration through vLLM, its profile, and the notes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend import target as targets
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
from vllm_sparse_backend.target import Target, is_gpu

if TYPE_CHECKING:
    from vllm_sparse_backend.backend.plan import DenseReason


class Estimate(BaseModel):
    """What `vllm-sparse estimate --json` prints."""

    model_config = ConfigDict(frozen=True)

    model: str
    facts: ModelFacts
    policies: str  # the profile, or what stands for one
    isa: str  # or a GPU's architecture
    base: str = "CPU_ATTN"  # dense attention there
    whose: str  # seconds they are, and how they are known
    timed: bool  # whether attention's rates were measured; never on a GPU
    dtype: str
    threads: int
    chunk_tokens: int
    positions: int  # that the model has
    parameters: int  # of the layers, an estimate
    matmul_rate: float | None  # 1e9 operations a second, of one thread; of a GPU not known
    matmul_measured: bool
    density_from: str
    sparse_layers: int
    dense_layers: dict[str, int]  # by reason
    # Tokens from which on the core with every tile kept is faster than CPU_ATTN; None: on a GPU,
    # where the base backend computes such prompts.
    core_from: int | None
    break_even: int | None  # tokens from which on policies are faster than keeping every tile
    break_even_best: int | None = None  # of a GPU: at the better end; the other is the worse
    listed: list[str] = []  # list selectors among the policies
    rows: list[Row]

    def title(self) -> str:
        """What was predicted for."""
        where = f"threads: {self.threads}" if self.timed else "PREDICTED, never timed on hardware"
        return f"{self.model}, {self.isa}, {self.dtype}, {where}"

    def notes(self) -> list[str]:
        """What the figures rest on, a line each."""
        dense = ", ".join(f"{count} {reason}" for reason, count in self.dense_layers.items())
        lines = [
            self._pays(),
            f"Policies: {self.policies}.",
            f"Density: {self.density_from}.",
            f"Layers: {self.sparse_layers} can be sparse"
            + (f", dense by {self.base}: {dense}." if dense else "."),
            *self._rests_on(),
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

    def _pays(self) -> str:
        """From where on."""
        if self.timed and self.break_even is not None:
            return (
                f"Following the policies pays from {self.break_even:,} tokens on (every tile kept, "
                f"the core beats CPU_ATTN from {self.core_from:,} on)."
            )
        if self.timed:
            return "Following the policies pays at no length."
        if self.break_even_best is None:
            return "Following the policies is predicted to pay at no length, at either end."
        worse = "at no length" if self.break_even is None else f"from {self.break_even:,} tokens on"
        return (
            f"Following the policies is predicted to pay {worse} at the worse end, from "
            f"{self.break_even_best:,} on at the better one; what launches cost is left out, so "
            "from no earlier."
        )

    def _rests_on(self) -> list[str]:
        """How the seconds are known, and what is left out."""
        if self.timed:
            rate = "measured" if self.matmul_measured else "predicted"
            return [
                f"TTFT is attention and matrix products: an estimate of "
                f"{self.parameters / 1e6:,.0f} million weights in Llama-like blocks at "
                f"{self.matmul_rate:g} GFLOP/s a thread ({rate}), chunks of {self.chunk_tokens}."
            ]
        return [
            f"Seconds of {self.whose}: from the instructions that the kernels compile to and from "
            f"published peaks, the range from perfect overlap of matrix units with all else to "
            f"none. {self.base}'s rate is its published one at long contexts and head_dim 128. "
            f"Chunks of {self.chunk_tokens}, no codes kept. What shared memory, caches, launches "
            "and uneven work cost is left out: the truth may lie above either end.",
            "TTFT, and attention's share of it, are not predicted for GPUs: no rate of their other "
            "products was measured.",
        ]


def make_estimate(
    model: str,
    profile: Path | None,
    lengths: list[int],
    *,
    target: str | None = None,
    threads: int | None = None,
    dtype: str = "auto",
) -> Estimate:
    """Predict. Raises Refused and SparsePrefillError; the message says what to change."""
    targets.check(target)
    if profile is not None:
        load_profile(profile)  # its errors before vLLM's
    with quiet():
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # or vLLM does not know the backend
        vllm_config = configuration(model, None if profile is None else str(profile))
        from vllm_sparse_backend.backend import expect, start

        setup = start.resolve(vllm_config)
        facts = start.facts_of(vllm_config.model_config)
        whose = targets.of(target, facts)
        platform = "cuda" if is_gpu(whose.name) else "cpu"
        reasons = expect.reasons(vllm_config, start.capabilities(platform), enabled=True)
    if profile is None or setup.profile is None:
        found = Found(Path(), None, "there is no measurement of these policies")
    else:
        found = find(setup.profile, profile)
    text = vllm_config.model_config.hf_text_config
    threads = _threads(whose, threads)
    subject = _subject(setup, found, reasons, facts, text, whose, _dtype(whose, dtype), threads)
    dense = Counter(str(reason) for reason in reasons if reason)
    return Estimate(
        model=Path(model).name if Path(model).is_dir() else model,
        facts=facts,
        policies=setup.policies(),
        isa=whose.name,
        base=whose.base,
        whose=whose.whose,
        timed=not is_gpu(whose.name),
        dtype=subject.dtype,
        threads=threads,
        chunk_tokens=subject.chunk_tokens,
        positions=int(getattr(text, "max_position_embeddings", None) or max(lengths)),
        parameters=subject.parameters,
        matmul_rate=None if is_gpu(whose.name) else cost.RATES[whose.name].matmul[subject.dtype],
        matmul_measured=(whose.name, subject.dtype) in cost.MATMUL_MEASURED,
        density_from=origin(found),
        sparse_layers=subject.sparse_layers,
        dense_layers=dict(dense),
        core_from=None
        if is_gpu(whose.name)
        else cost.core_wins_from(whose.name, facts.num_heads, facts.head_dim),
        break_even=break_even(subject),
        break_even_best=break_even(replace(subject, target=whose.ends[0]))
        if is_gpu(whose.name)
        else None,
        listed=sorted({it.selector for it in subject.policies if isinstance(it, ListSelector)}),
        rows=[predict(subject, length) for length in lengths],
    )


def _subject(
    setup: Any,
    found: Found,
    reasons: list[DenseReason | None],
    facts: ModelFacts,
    text: Any,
    target: Target,
    dtype: str,
    threads: int,
) -> Subject:
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
        target=target,
        dtype=dtype,
        threads=threads,
        chunk_tokens=target.chunk_tokens,
        min_prompt_tokens=setup.config.min_prompt_tokens,
        parameters=layer_parameters(text, facts),
        policies=policies,
        windows=[window if r == "sliding_window" else None for r in reasons if r],
        measurement=found.measurement,
    )


def _dtype(target: Target, asked: str) -> str:
    """What the model computes in. Raises Refused for what nothing is predicted of."""
    if is_gpu(target.name) and asked == "float32":
        raise Refused(
            f"--dtype: of {target.name} bfloat16 and float16 are predicted, got float32, which has "
            "no matrix units there"
        )
    if asked != "auto":
        return asked
    return "float32" if target.name == "avx2" else "bfloat16"


def _threads(target: Target, asked: int | None) -> int:
    """Raises Refused where they would be ignored."""
    if is_gpu(target.name) and asked is not None:
        raise Refused(f"--threads: want it with a CPU's --target, got it with {target.name}")
    return asked or 1


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
