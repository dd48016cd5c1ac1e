"""What attention costs: the core's and CPU_ATTN's, predicted from rates that were measured once.

Rates are shipped and not taken at start, so that two starts of a server decide alike: what is
decided here is whether a prompt is approximated. Only their ratios matter, which differ less
between machines with the same instruction set than the rates do. ``loadtest/kernels.py`` measures
them (``--isa`` forces one): the AVX-512 ones here on a Zen 5, those of AVX2 on a machine that has
no more.

The matrix products' rates decide nothing; `vllm-sparse estimate` tells by them what attention's
share of a prefill is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_sparse_backend.selection import AnyPolicy, Dense, ListSelector, Static, keeps_all

Q_BLOCK = 64
# Of the tiles beyond sink and window, what a scored head is taken to keep where nothing is known
# of it: more than any head's share that was measured on text of 8K, so that a head is sparse
# only where that surely pays.
EXPECTED_KEPT = 0.5
NEVER = 2**31 - 1  # tokens of context


@dataclass(frozen=True, slots=True)
class Rates:
    """One thread's, in 1e9 operations a second; a multiply-add is two."""

    attend: float  # keep-all
    base: float  # CPU_ATTN
    score: float  # selectors' estimates, at 4 or 6 bits
    score_8: float  # at 8
    matmul: Mapping[str, float]  # the model's matrix products, by dtype
    call_seconds: float = 2e-4  # what a call costs however short, over one of CPU_ATTN
    block_seconds: float = 5e-6  # what selecting costs a head and q block, however few its keys


# Without BF16 instructions, AVX-512 is taken to convert at about the cost of the products.
_MATMUL_512 = {"float32": 230, "bfloat16": 115, "float16": 115}
RATES = {
    "avx512_bf16": Rates(
        attend=400, base=200, score=900, score_8=900,
        matmul={"float32": 230, "bfloat16": 440, "float16": 230},
    ),
    "avx512_vnni": Rates(attend=225, base=200, score=900, score_8=900, matmul=_MATMUL_512),
    "avx512": Rates(attend=225, base=200, score=700, score_8=400, matmul=_MATMUL_512),
    "avx2": Rates(
        attend=70, base=32, score=180, score_8=90,
        matmul={"float32": 72, "bfloat16": 8.7, "float16": 8.7},
    ),
}  # fmt: skip
# Instruction set and dtype, of products of SmolLM2's sizes; that of avx512_bf16 follows from what a
# whole prefill of it takes. All other rates of matrix products are predicted from peaks.
MATMUL_MEASURED = {("avx512_bf16", "bfloat16"), ("avx2", "float32"), ("avx2", "bfloat16")}


def attend_seconds(isa: str, rows: int, context: int, heads: int, head_dim: int) -> float:
    """Of the core with every tile kept, for the last ``rows`` of ``context`` tokens."""
    work = _operations(rows, context, heads, head_dim)
    return RATES[isa].call_seconds + work / RATES[isa].attend * 1e-9


def base_seconds(isa: str, rows: int, context: int, heads: int, head_dim: int) -> float:
    """Of CPU_ATTN, for the same."""
    return _operations(rows, context, heads, head_dim) / RATES[isa].base * 1e-9


def selection_seconds(
    isa: str,
    policy: AnyPolicy,
    rows: int,
    context: int,
    heads: int,
    head_dim: int,
    prompt: int | None = None,
) -> float:
    """Of choosing the tiles of ``heads`` heads with this policy, in a step of the last ``rows`` of
    ``context`` tokens of a ``prompt`` (of ``context``, unless given), at whose end the policy's
    tail is. 0 where nothing is scored: for `dense`, for `static`, and at a threshold of 0; and for
    list selectors, whose time nobody knows.
    """
    if isinstance(policy, Dense | Static | ListSelector) or keeps_all(policy):
        return 0.0
    first, end = (context - rows) // Q_BLOCK * Q_BLOCK, context
    # Keys beyond sink and window, of each q block that has any.
    beyond = [
        keys
        for start in range(first, end, Q_BLOCK)
        if (keys := start - policy.sink - policy.window_at(start + Q_BLOCK)) > 0
    ]
    sampled = sum(beyond) * Q_BLOCK / policy.row_stride
    tail_rows = max(0, min(rows, policy.tail - (context if prompt is None else prompt) + context))
    tail = tail_rows * (1 - 1 / policy.row_stride) * (beyond[-1] if beyond else 0)
    rates = RATES[isa]
    rate = rates.score_8 if policy.bits == 8 else rates.score
    of_a_head = 2 * head_dim * (sampled + tail) / rate * 1e-9 + len(beyond) * rates.block_seconds
    return heads * of_a_head


def sparse_seconds(
    isa: str,
    policy: AnyPolicy,
    rows: int,
    context: int,
    heads: int,
    head_dim: int,
    density: float,
    prompt: int | None = None,
) -> float:
    """Of ``heads`` heads with this policy that keep ``density`` of their tiles: selection, and
    attention over what is kept. Arguments as those of `selection_seconds`.

    Without `Rates.call_seconds`, which all heads of a layer share and `attend_seconds` counts.
    """
    attend = _operations(rows, context, heads, head_dim) / RATES[isa].attend * 1e-9
    select = selection_seconds(isa, policy, rows, context, heads, head_dim, prompt)
    return density * attend + select


def matmul_seconds(isa: str, dtype: str, tokens: int, parameters: float) -> float:
    """Of a prompt's matrix products with ``parameters`` weights, every token with each of them."""
    return 2.0 * tokens * parameters / RATES[isa].matmul[dtype] * 1e-9


def core_wins_from(isa: str, heads: int, head_dim: int) -> int:
    """The shortest prompt that the core, keeping all, reads at least as fast as CPU_ATTN.

    A multiple of 64 tokens.
    """
    tokens = Q_BLOCK
    while attend_seconds(isa, tokens, tokens, heads, head_dim) > base_seconds(
        isa, tokens, tokens, heads, head_dim
    ):
        tokens += Q_BLOCK
    return tokens


def sparse_wins_from(isa: str, policy: AnyPolicy, head_dim: int) -> int | None:
    """The shortest context at which a head with this policy is faster than one that keeps all.

    By its last q block, with `EXPECTED_KEPT` of what is scored being kept; None: at no length. Of a
    list selector, whose time is not known, as soon as there is something to leave out.
    """
    if isinstance(policy, Dense) or keeps_all(policy):
        return None
    if policy.growth == 1:
        return None
    always = policy.sink + policy.local + Q_BLOCK
    if isinstance(policy, Static | ListSelector):
        return math.ceil(always / (1 - policy.growth))
    rates = RATES[isa]
    key = 4 * head_dim * Q_BLOCK / rates.attend * 1e-9  # seconds to attend to it
    rate = rates.score_8 if policy.bits == 8 else rates.score
    score = 2 * head_dim * Q_BLOCK / policy.row_stride / rate * 1e-9
    saved = (1 - EXPECTED_KEPT) * key - score
    if saved <= 0:
        return None
    return math.ceil((always + rates.block_seconds / saved) / (1 - policy.growth))


def followed_from(isa: str, policy: AnyPolicy, head_dim: int, least: int) -> int:
    """The context from which on a server follows a head's policy: no shorter than ``least``, since
    a policy costs more than keeping all while little lies beyond its window."""
    wins = sparse_wins_from(isa, policy, head_dim)
    return NEVER if wins is None else max(least, wins)


def _operations(rows: int, context: int, heads: int, head_dim: int) -> float:
    pairs = rows * context - rows * (rows - 1) / 2
    return 4.0 * heads * head_dim * pairs
