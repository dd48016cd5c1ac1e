"""Estimated scores relative to a row's threshold, in plain torch: what `sale` and `mass` judge by.

Source: SALE, arXiv 2505.24179, section 3.2. Differences, all of them parameters or said
here: tile size, bits and scored rows are free; K is quantized in groups of 16 keys and Q
per row, so that no scale depends on how a prompt is cut into chunks; only K's mean is
subtracted (Q's mean would have to be known before the first q block is computed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.selection.policy import Q_BLOCK, Bits, Mass, Sale
from vllm_sparse_backend.selection.static import always_kept

KEY_GROUP = 16  # keys that share one quantization step
KEY_CODES: dict[Bits, float] = {8: 127.0, 6: 31.0, 4: 7.0, "fp4": 12.0}
# Smaller at 8 bits: shifted to be unsigned, two products with a key's then fit in 16 bits,
# which is what a machine without an int8 dot product sums them in.
QUERY_CODES: dict[Bits, float] = {8: 63.0, 6: 31.0, 4: 7.0, "fp4": 12.0}


class Quantized(NamedTuple):
    """Integers, held in fp32, and the size of their unit."""

    ints: torch.Tensor  # fp32 [S, D]
    step: torch.Tensor  # fp32 [S]; NaN where the input was not finite


class Block(NamedTuple):
    """The estimates of one q block."""

    excess: torch.Tensor  # fp32 [R, keys]: scaled score less the row's threshold, in nats
    always: torch.Tensor  # bool [causal tiles]: kept whatever the scores say


def quantize(x: torch.Tensor, limits: dict[Bits, float], bits: Bits, group: int = 1) -> Quantized:
    """Quantize fp32 ``x`` [S, D] symmetrically, one step per ``group`` rows from row 0.

    ``limits``: the largest code of each kind. Rounds half to even, in "fp4" half to the code whose
    mantissa is. All-zero groups become zeros; a group with an inf or a NaN gets the step NaN, which
    no comparison with a threshold can drop.
    """
    limit = limits[bits]
    padded = pad(x, (0, 0, 0, -x.shape[0] % group))
    peaks = padded.reshape(-1, group * x.shape[1]).abs().amax(1)  # [groups]
    amax = peaks.repeat_interleave(group)[: x.shape[0]]
    # A division of tensors: torch takes number / tensor for number * (1 / tensor), which is
    # off by an ulp, and in 16-bit inputs a product that lies on a half is common.
    inv = torch.where(amax == 0, 0.0, torch.full_like(amax, limit) / amax)
    scaled = (x * inv[:, None]).clamp(-limit, limit).nan_to_num(0.0)
    # Between powers of two there are two codes of a 4-bit float.
    unit = _fp4_unit(scaled) if bits == "fp4" else torch.ones(())
    ints = (scaled / unit).round() * unit
    return Quantized(ints, torch.where(amax.isfinite(), amax / limit, torch.nan))


def _fp4_unit(x: torch.Tensor) -> torch.Tensor:
    """The distance of the codes around ``x``: 1 up to 4, 2 up to 8, 4 from there on."""
    return 1.0 + (x.abs() >= 4) + 2.0 * (x.abs() >= 8)


def quantize_keys(
    k: torch.Tensor, bits: Bits, mean_of: int | None = None
) -> tuple[Quantized, torch.Tensor]:
    """Quantize all keys of one kv head, [S, D], about the mean of the first ``mean_of`` of them,
    all unless given. Returns the mean, fp32 [D]."""
    mean = k[:mean_of].double().mean(0).float()
    return quantize(k.float() - mean, KEY_CODES, bits, KEY_GROUP), mean


def scored_rows(policy: Sale | Mass, first: int, end: int, prompt_len: int) -> torch.Tensor:
    """The positions of a q block's scored rows, of those from ``first`` to ``end``.

    ``64 / row_stride`` of a whole block, spread evenly, its first and last among them: of a
    question of a few tokens more than the stride some row is then scored in each q block that it
    touches. Of what is there of a block, the first and the last; and all from the prompt's ``tail``
    last on.
    """
    position = torch.arange(first, end)
    place, count = position % Q_BLOCK, Q_BLOCK // policy.row_stride
    sampled = [(i * (Q_BLOCK - 1) + (count - 1) // 2) // (count - 1) for i in range(count)]
    scored = torch.isin(place, torch.tensor(sampled)) | (position >= prompt_len - policy.tail)
    scored[0] = scored[-1] = True
    return position[scored]


def estimates(
    policy: Sale | Mass,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
    prompt_len: int | None = None,
    mean_of: int | None = None,
) -> Iterator[Block]:
    """Each q block's estimates. One head of one request: ``q`` [T, D] are the last T of the
    positions of ``k`` [S, D]; ``blocks`` are its q blocks, ``(start, first, end)`` with the
    aligned position, the first present row and one past the last. ``prompt_len``: of the prompt
    of which this may be a chunk; S unless given. ``mean_of``: as in `quantize_keys`.

    Where an input was not finite ``excess`` may be NaN; the integers and their steps are
    exact, given IEEE arithmetic.
    """
    offset = k.shape[0] - q.shape[0]
    keys, mean = quantize_keys(k, policy.bits, mean_of)
    for start, first, end in blocks:
        position = scored_rows(policy, first, end, k.shape[0] if prompt_len is None else prompt_len)
        row = q[position - offset].float()  # [R, D]
        always = always_kept(policy, start, end)  # [tiles]
        always_key = always.repeat_interleave(policy.tile)[:end]
        visible = always_key & (torch.arange(end) <= position[:, None])  # [R, end]

        score = scale * (row @ k[:end].float().T)  # [R, end]
        score = score.masked_fill(~visible, -torch.inf)
        m = score.amax(1, keepdim=True)
        total = (score - m).exp().sum(1, keepdim=True)
        threshold = m + (policy.tau_at(start + Q_BLOCK) * total).log()  # [R, 1]

        query = quantize(row, QUERY_CODES, policy.bits)
        step = query.step[:, None] * keys.step[:end]
        estimate = scale * (step * (query.ints @ keys.ints[:end].T) + (row @ mean)[:, None])
        yield Block(estimate - threshold, always)


def by_tile(x: torch.Tensor, tile: int, value: float) -> torch.Tensor:
    """[R, keys] to [R, tiles, tile], what is missing of the last tile filled with ``value``."""
    return pad(x, (0, -x.shape[1] % tile), value=value).unflatten(1, (-1, tile))
