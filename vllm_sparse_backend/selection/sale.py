"""SALE's relative attention score in plain torch: the rule the kernels are held to.

Source: SALE, arXiv 2505.24179, section 3.2. Differences, all of them parameters or said
here: tile size, bits and scored rows are free; K is quantized in groups of 16 keys and Q
per row, so that no scale depends on how a prompt is cut into chunks; only K's mean is
subtracted (Q's mean would have to be known before the first q block is computed).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.selection.policy import Sale
from vllm_sparse_backend.selection.static import always_kept

KEY_GROUP = 16  # keys that share one quantization step


class Quantized(NamedTuple):
    """Integers of at most ``2^(bits-1) - 1``, held in fp32, and the size of their unit."""

    ints: torch.Tensor  # fp32 [S, D]
    step: torch.Tensor  # fp32 [S]; NaN where the input was not finite


def quantize(x: torch.Tensor, bits: int, group: int = 1) -> Quantized:
    """Quantize fp32 ``x`` [S, D] symmetrically, one step per ``group`` rows from row 0.

    Rounds half to even. All-zero groups become zeros; a group with an inf or a NaN gets
    the step NaN, which no comparison with a threshold can drop.
    """
    qmax = float(2 ** (bits - 1) - 1)
    padded = pad(x, (0, 0, 0, -x.shape[0] % group))
    peaks = padded.reshape(-1, group * x.shape[1]).abs().amax(1)  # [groups]
    amax = peaks.repeat_interleave(group)[: x.shape[0]]
    # A division of tensors: torch takes number / tensor for number * (1 / tensor), which is
    # off by an ulp, and in 16-bit inputs a product that lies on a half is common.
    inv = torch.where(amax == 0, 0.0, torch.full_like(amax, qmax) / amax)
    ints = (x * inv[:, None]).round().clamp(-qmax, qmax).nan_to_num(0.0)
    return Quantized(ints, torch.where(amax.isfinite(), amax / qmax, torch.nan))


def quantize_keys(k: torch.Tensor, bits: int) -> tuple[Quantized, torch.Tensor]:
    """Quantize all keys of one kv head, [S, D], about their mean. Returns the mean, fp32 [D]."""
    mean = k.double().mean(0).float()
    return quantize(k.float() - mean, bits, KEY_GROUP), mean


def margins(
    policy: Sale,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
) -> list[torch.Tensor]:
    """By how much each tile's best score estimate exceeds its row's threshold, in nats.

    One head of one request: ``q`` [T, D] are the last T of the positions of ``k`` [S, D];
    ``blocks`` are its q blocks, ``(start, first, end)`` with the aligned position, the
    first present row and one past the last. Returns fp32 [causal tiles] per block: +inf
    where a tile is always kept or ``tau`` is 0, NaN where an input was not finite.

    A margin within fp32 rounding of 0 may come out on either side of it in another
    implementation, because m and l are sums whose order is free; the integers and their
    steps are exact, given IEEE arithmetic.
    """
    offset = k.shape[0] - q.shape[0]
    keys, mean = quantize_keys(k, policy.bits)
    result = []
    for start, first, end in blocks:
        position = torch.arange(first, end)
        scored = (position % policy.row_stride == 0) | (position >= k.shape[0] - policy.tail)
        scored[-1] = True
        position = position[scored]  # [R]
        row = q[position - offset].float()  # [R, D]
        always = always_kept(policy, start, end)  # [tiles]
        always_key = always.repeat_interleave(policy.tile)[:end]
        visible = always_key & (torch.arange(end) <= position[:, None])  # [R, end]

        score = scale * (row @ k[:end].float().T)  # [R, end]
        score = score.masked_fill(~visible, -torch.inf)
        m = score.amax(1, keepdim=True)
        total = (score - m).exp().sum(1, keepdim=True)
        threshold = m + (policy.tau * total).log()  # [R, 1]

        query = quantize(row, policy.bits)
        step = query.step[:, None] * keys.step[:end]
        estimate = scale * (step * (query.ints @ keys.ints[:end].T) + (row @ mean)[:, None])
        best = (estimate - threshold).amax(0)  # [end]
        best = pad(best, (0, -end % policy.tile), value=-torch.inf)
        best = best.view(-1, policy.tile).amax(1)
        result.append(best.masked_fill(always | (policy.tau == 0), torch.inf))
    return result


def keep(
    policy: Sale,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
) -> list[torch.Tensor]:
    """The kept tiles of each q block, bool [causal tiles] each; arguments as ``margins``.

    Written as "not at most 0", so that NaN keeps a tile: with inputs that are not finite
    nothing is known about it.
    """
    return [~(margin <= 0) for margin in margins(policy, q, k, scale, blocks)]
