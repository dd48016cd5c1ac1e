"""What attention costs: the core's and CPU_ATTN's, predicted from rates that were measured once.

Rates are shipped and not taken at start, so that two starts of a server decide alike: what is
decided here is whether a prompt is approximated. Only their ratios matter, which differ less
between machines with the same instruction set than the rates do. ``loadtest/kernels.py`` measures
them; those of ``avx512`` and ``avx512_vnni`` are scaled from the others by their peaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_sparse_backend.selection import AnyPolicy, Dense, Static, keeps_all

Q_BLOCK = 64
# Of the tiles beyond sink and window, what a scored head is taken to keep where nothing is known
# of it: more than any head's share that was measured on text of 8K, so that a head is sparse
# only where that surely pays.
EXPECTED_KEPT = 0.5


@dataclass(frozen=True, slots=True)
class Rates:
    """One thread's, in 1e9 operations a second; a multiply-add is two."""

    attend: float  # keep-all
    base: float  # CPU_ATTN
    score: float  # selectors' estimates, at 4 or 6 bits
    score_8: float  # at 8
    call_seconds: float = 2e-4  # what a call costs however short, over one of CPU_ATTN
    block_seconds: float = 5e-6  # what selecting costs a head and q block, however few its keys


RATES = {
    "avx512_bf16": Rates(attend=300, base=160, score=450, score_8=450),
    "avx512_vnni": Rates(attend=175, base=160, score=450, score_8=450),
    "avx512": Rates(attend=175, base=160, score=400, score_8=200),
    "avx2": Rates(attend=70, base=32, score=180, score_8=90),
}


def attend_seconds(isa: str, rows: int, context: int, heads: int, head_dim: int) -> float:
    """Of the core with every tile kept, for the last ``rows`` of ``context`` tokens."""
    work = _operations(rows, context, heads, head_dim)
    return RATES[isa].call_seconds + work / RATES[isa].attend * 1e-9


def base_seconds(isa: str, rows: int, context: int, heads: int, head_dim: int) -> float:
    """Of CPU_ATTN, for the same."""
    return _operations(rows, context, heads, head_dim) / RATES[isa].base * 1e-9


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

    By its last q block, with `EXPECTED_KEPT` of what is scored being kept; None: at no length.
    """
    if isinstance(policy, Dense) or keeps_all(policy):
        return None
    window = policy.sink + policy.local + Q_BLOCK
    if isinstance(policy, Static):
        return window if policy.growth < 1 else None
    rates = RATES[isa]
    key = 4 * head_dim * Q_BLOCK / rates.attend * 1e-9  # seconds to attend to it
    rate = rates.score_8 if policy.bits == 8 else rates.score
    score = 2 * head_dim * Q_BLOCK / policy.row_stride / rate * 1e-9
    saved = (1 - EXPECTED_KEPT) * key - score
    return window + math.ceil(rates.block_seconds / saved) if saved > 0 else None


def _operations(rows: int, context: int, heads: int, head_dim: int) -> float:
    pairs = rows * context - rows * (rows - 1) / 2
    return 4.0 * heads * head_dim * pairs
