"""What attention costs on GPUs: PREDICTED, never timed on hardware.

The rates (rates.json) are made by `make gpu-model` of the instructions that the kernels compile to
and of published peaks, as docs/gpu-model.md is; nothing here has run on a GPU. Each is a range: the
better end lets a multiprocessor's matrix units work while others issue, the worse one adds the two.
Left out is what shared memory, caches, launches and uneven work cost, so the truth may lie above
either end. Calibration weighs candidates by the mean of the ends (`target`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import torch
from pydantic import BaseModel, ConfigDict, RootModel

from vllm_sparse_backend.ops.tiles import Q_BLOCK
from vllm_sparse_backend.ops.triton.launch import launch, packs, padded
from vllm_sparse_backend.ops.triton.work import SLOT_ROWS
from vllm_sparse_backend.selection import AnyPolicy, Dense, ListSelector, Static, keeps_all

FILE: Final = Path(__file__).with_name("rates.json")
Ends = tuple[float, float]  # better, worse
BETTER, WORSE = 0, 1  # of Ends


class _Rates(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CodeRates(_Rates):
    """Of scoring with one kind of codes, as `HeadRates`."""

    score: Ends  # of products with keys' codes
    anchor: dict[int, Ends]  # exact scores of the sampled rows, by q heads scored together


class HeadRates(_Rates):
    """Of one head_dim, in bfloat16 or float16, in 1e12 operations a second of a whole GPU; a
    multiply-add is two."""

    attend: Ends
    int8: CodeRates  # what integers are carried in, whatever their bits
    fp4: CodeRates | None = None  # where 4-bit floats are multiplied as such


class GpuRates(_Rates):
    """Of the GPU that stands for an architecture."""

    gpu: str
    dense: str  # what dense attention is
    dense_rate: float  # 1e12 operations a second, published, at long contexts and head_dim 128
    bandwidth: float  # 1e12 bytes a second
    chunk: int  # tokens of a step, as vLLM's server has them there unless told otherwise
    compact: float  # 1e12 keys a second whose bits become lists, of a head and q block
    heads: dict[int, HeadRates]  # by head_dim


class RatesFile(RootModel[dict[str, GpuRates]]):
    """By architecture."""


@cache
def rates() -> dict[str, GpuRates]:
    """Those that ship with the package, by architecture: of the others nothing is predicted."""
    return RatesFile.model_validate_json(FILE.read_bytes()).root


def dense_seconds(arch: str, rows: int, context: int, heads: int, head_dim: int) -> float:
    """Of the base backend's dense attention, for the last ``rows`` of ``context`` tokens."""
    return _operations(rows, context, heads, head_dim) / rates()[arch].dense_rate * 1e-12


def attend_seconds(
    arch: str, end: int, rows: int, context: int, heads: int, head_dim: int
) -> float:
    """Of our kernel with every tile kept, for the same; ``end``: BETTER or WORSE."""
    rate = rates()[arch].heads[head_dim].attend[end]
    return _operations(rows, context, heads, head_dim) / rate * 1e-12


def selection_seconds(
    arch: str,
    end: int,
    policy: AnyPolicy,
    rows: int,
    context: int,
    heads: int,
    head_dim: int,
    group: int,
    chunk_tokens: int,
    prompt: int | None = None,
) -> float:
    """Of choosing the tiles of ``heads`` heads with this policy, ``group`` of them to a kv head, in
    steps of at most ``chunk_tokens`` that compute the last ``rows`` of ``context`` tokens of a
    ``prompt`` (of ``context``, unless given), at whose end the policy's tail is.

    Heads that are scored share the codes of their keys, which each step makes anew of all, and one
    product for so many rows: a head is charged its part of that, as if all of its group scored. 0
    for what keeps all, and for list selectors, whose time nobody knows.
    """
    if isinstance(policy, Dense | ListSelector) or keeps_all(policy):
        return 0.0
    its = rates()[arch]
    begin = context - rows
    ends = range(begin // Q_BLOCK * Q_BLOCK + Q_BLOCK, context + Q_BLOCK, Q_BLOCK)
    listed = sum(ends) / its.compact
    if isinstance(policy, Static):
        return heads * listed * 1e-12
    how = launch(arch, head_dim, group, torch.bfloat16)
    share = padded(how.share)
    of_head = its.heads[head_dim]
    packed = of_head.fp4 if packs(arch, policy.bits) else None
    codes = packed or of_head.int8
    tail = (context if prompt is None else prompt) - policy.tail
    score = anchor = 0.0  # multiply-adds times two
    for last in ends:
        whole = min(last, context) > tail  # all rows of a block in which some of the tail's are
        slots = -(-(Q_BLOCK if whole else Q_BLOCK // policy.row_stride) // SLOT_ROWS)
        scored = 2.0 * head_dim * slots * SLOT_ROWS * share / how.share
        score += scored * last
        window = min(last, policy.sink + policy.window_at(last) + Q_BLOCK)
        anchor += scored * (window + how.anchor.block)
    keys = sum(range(context, begin, -chunk_tokens))
    moved = 2 + 2 + (0.5 if packed else 1)  # bytes: read twice, written once
    seconds = score / codes.score[end] + anchor / codes.anchor[share][end] + listed
    return heads * (seconds + keys * head_dim * moved / group / its.bandwidth) * 1e-12


def _operations(rows: int, context: int, heads: int, head_dim: int) -> float:
    pairs = rows * context - rows * (rows - 1) / 2
    return 4.0 * heads * head_dim * pairs
