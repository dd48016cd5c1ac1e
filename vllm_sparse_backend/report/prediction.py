"""What prefilling a prompt would take, by the cost model and the model's configuration alone.

Attention is predicted step by step as a server reads a prompt. The rest of a prefill is taken to
be its matrix products, with the parameters of Llama-like blocks; norms, sampling and the way
through HTTP are left out. Of GPUs the rest is not predicted: no rate of theirs was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.calibrate.results import HeadResult, Measurement
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.report.measured import density_at
from vllm_sparse_backend.selection import AnyPolicy, Dense, Static, keeps_all
from vllm_sparse_backend.target import Target, is_gpu

LONGEST = 1 << 20  # tokens; where no break-even was found up to here, there is none


@dataclass(frozen=True)
class Subject:
    """A model on a kind of machine, as it would be served."""

    facts: ModelFacts
    target: Target
    dtype: str
    threads: int
    chunk_tokens: int
    min_prompt_tokens: int
    parameters: int  # of the layers, without embeddings
    policies: dict[AnyPolicy, int]  # of the heads of layers that can be sparse, counted
    windows: list[int | None]  # of the layers that are dense: a sliding window's keys; None: all
    measurement: Measurement | None = None
    _heads: dict[AnyPolicy, list[HeadResult]] = field(default_factory=dict, init=False)
    _known: dict[tuple[AnyPolicy, int], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for head in self.measurement.heads if self.measurement else ():
            if head.figures:
                self._heads.setdefault(head.policy, []).append(head)

    @cached_property
    def sparse_layers(self) -> int:
        """How many layers can be sparse."""
        return self.facts.num_layers - len(self.windows)

    def density(self, policy: AnyPolicy, tokens: int) -> float:
        """Of a whole prompt of so many tokens, mean of the heads with this policy: as measured,
        or as expected where nothing was."""
        if (policy, tokens) not in self._known:  # steps of all lengths begin at the same tokens
            self._known[policy, tokens] = self._density(policy, tokens)
        return self._known[policy, tokens]

    def _density(self, policy: AnyPolicy, tokens: int) -> float:
        heads = self._heads.get(policy)
        if keeps_all(policy) or tokens <= 0:
            return 1.0
        if not heads:
            return expected_density(policy, tokens)
        return sum(density_at(head.figures, tokens) for head in heads) / len(heads)


class Row(BaseModel):
    """Seconds for a prompt of one length; of a GPU the worse end of a range, unless it is said."""

    model_config = ConfigDict(frozen=True)

    length: int
    base: float  # dense attention (CPU_ATTN's, of a GPU the base backend's) in every layer
    keep_all: float  # by the core in the layers that can be sparse, every tile kept
    sparse: float  # likewise, the policies followed
    keep_all_best: float | None = None  # of a GPU, the better end
    sparse_best: float | None = None
    rest: float | None  # matrix products; None: of a GPU, where they are not predicted
    density: float  # of the heads in layers that can be sparse

    @property
    def dense_ttft(self) -> float:
        """All of a prefill with dense attention; as what follows, where the rest is known."""
        return self.base + (self.rest or 0.0)

    @property
    def sparse_ttft(self) -> float:
        """All of a prefill with the policies followed."""
        return self.sparse + (self.rest or 0.0)

    @property
    def dense_share(self) -> float:
        """Of dense attention in the prefill."""
        return self.base / self.dense_ttft

    @property
    def sparse_share(self) -> float:
        """Of attention in the sparse prefill."""
        return self.sparse / self.sparse_ttft


def predict(subject: Subject, length: int) -> Row:
    """A cold prompt of `length` tokens, read in steps of `subject.chunk_tokens`."""
    row = _predict(subject, length)
    for better in subject.target.ends[:-1]:
        best = _predict(replace(subject, target=better), length)
        its = {"keep_all_best": best.keep_all, "sparse_best": best.sparse}
        row = row.model_copy(update=its)
    return row


def _predict(subject: Subject, length: int) -> Row:
    facts, target = subject.facts, subject.target
    heads, dim, layers = facts.num_heads, facts.head_dim, subject.sparse_layers
    base = keep_all = sparse = kept = whole = 0.0
    for begin in range(0, length, subject.chunk_tokens):
        end = min(begin + subject.chunk_tokens, length)
        shape = (end - begin, end, heads, dim)
        dense = sum(_base_seconds(subject, begin, end, window) for window in subject.windows)
        # Where no layer can be sparse, its shape may be one that nothing is known of.
        of_base = layers * target.base_seconds(*shape) if layers else 0.0
        of_core = layers * target.attend_seconds(*shape) if layers else 0.0
        base += dense + of_base
        keep_all += dense + of_core
        pairs = (end**2 - begin**2) / 2
        whole += pairs
        if end < subject.min_prompt_tokens:
            sparse += dense + (layers * target.short_seconds(*shape) if layers else 0.0)
            kept += pairs
            continue
        followed, density = _follow(subject, begin, end, length)
        sparse += dense + followed + layers * target.call_seconds
        kept += density * pairs
    return Row(
        length=length,
        base=base / subject.threads,
        keep_all=keep_all / subject.threads,
        sparse=sparse / subject.threads,
        rest=_rest(subject, length),
        density=kept / whole if layers else 1.0,
    )


def _rest(subject: Subject, length: int) -> float | None:
    name = subject.target.name
    if is_gpu(name):
        return None
    products = cost.matmul_seconds(name, subject.dtype, length, subject.parameters)
    return products / subject.threads


def _base_seconds(subject: Subject, begin: int, end: int, window: int | None) -> float:
    """Of dense attention in a dense layer; of a sliding window it computes no more than that."""
    heads, dim = subject.facts.num_heads, subject.facts.head_dim

    def until(tokens: int) -> float:  # as many pairs as the last `window` rows have without one
        rows = tokens if window is None else min(window, tokens)
        return subject.target.base_seconds(rows, tokens, heads, dim)

    return until(end) - until(begin)


def _follow(subject: Subject, begin: int, end: int, prompt: int) -> tuple[float, float]:
    """Seconds of one step of all heads that can be sparse, and the mean density."""
    seconds = kept = 0.0
    dim, target = subject.facts.head_dim, subject.target
    for policy, heads in subject.policies.items():
        follows = target.follows(policy, end, dim)
        # Of the step alone: what a prompt up to its end keeps, less what one up to its begin does.
        density = (
            (
                subject.density(policy, end) * end**2
                - subject.density(policy, begin) * begin**2
            )
            / (end**2 - begin**2)
            if follows
            else 1.0
        )  # fmt: skip
        density = min(1.0, max(0.0, density))
        seconds += target.sparse_seconds(
            policy if follows else Dense(), end - begin, end, heads, dim, density, prompt
        )
        kept += heads * density
    return seconds, kept / max(1, sum(subject.policies.values()))


def break_even(subject: Subject) -> int | None:
    """The shortest prompt, to 64 tokens, that following the policies makes faster than keeping
    every tile with CPU_ATTN or the core, or, on a GPU, at the end that ``subject.target`` is, than
    dense attention; None: none up to `LONGEST`."""
    dense_alone = is_gpu(subject.target.name)

    def wins(tokens: int) -> bool:
        row = _predict(subject, tokens)
        return row.sparse < 0.999 * (row.base if dense_alone else min(row.keep_all, row.base))

    low, high = 0, cost.Q_BLOCK
    while not wins(high):
        low, high = high, 2 * high
        if high > LONGEST:
            return None
    while high - low > cost.Q_BLOCK:
        middle = (low + high) // 2 // cost.Q_BLOCK * cost.Q_BLOCK
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high


def expected_density(policy: AnyPolicy, tokens: int) -> float:
    """Of a prompt, where nothing was measured: sink and window, and of what is scored beyond them
    `cost.EXPECTED_KEPT`. Of `static`, sink and window are all there is, and exact."""
    if isinstance(policy, Dense) or keeps_all(policy):
        return 1.0
    beyond = 0.0 if isinstance(policy, Static) else cost.EXPECTED_KEPT
    kept = causal = 0.0
    for end in range(cost.Q_BLOCK, tokens + cost.Q_BLOCK, cost.Q_BLOCK):
        window = min(end, policy.sink + policy.window_at(end) + cost.Q_BLOCK)
        kept += window + beyond * (end - window)
        causal += end
    return kept / causal


def layer_parameters(config: object, facts: ModelFacts) -> int:
    """Weights that each token is multiplied with in all layers, counted as of Llama-like blocks:
    the attention's four projections and a gated MLP, of experts as many as a token is sent to.

    `config` is the model's own (Hugging Face's). An estimate for any other kind of block.
    """

    def number(*names: str, default: int = 0) -> int:
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, list | tuple) and value:  # one a layer
                value = sum(value) // len(value)
            if value:
                return int(value)
        return default

    hidden = number("hidden_size", "n_embd", "d_model")
    attention = 2 * hidden * facts.head_dim * (facts.num_heads + facts.num_kv_heads)
    experts = number("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    names = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim")
    if experts:
        width = experts * number("moe_intermediate_size", *names)
        shared = number("shared_expert_intermediate_size")
        width += shared or number("n_shared_experts") * number("moe_intermediate_size")
    else:
        width = number(*names, default=4 * hidden)
    return facts.num_layers * (attention + 3 * hidden * width)


def count_policies(rows: Iterable[list[AnyPolicy]]) -> dict[AnyPolicy, int]:
    """How many heads of these layers follow each policy."""
    return dict(Counter(policy for row in rows for policy in row))
