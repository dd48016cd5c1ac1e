"""`sale` at the paper's own granularity and bits, against a transcription of the paper's SALE.

Both quantize to 4 bits, but not the same numbers by the same scales, so that they may differ where
a score is within what quantization may change it by, and nowhere else.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from _rules import SCALE, Array, step

from vllm_sparse_backend.ops.reference import select
from vllm_sparse_backend.selection import Sale

PAPER = Sale(sink=32, local=256, tile=32, bits=4, row_stride=1, tail=0, tau=0.008)


def quantized(x: Array, scales: Array) -> Array:
    """Nearest of the 15 multiples of each row's scale; a scale of 0 is of zeros."""
    steps = np.where(scales > 0, scales, 1.0)[:, None]
    return np.asarray(np.clip(np.rint(x / steps), -7, 7) * steps)


def by_groups(x: Array, size: int) -> Array:
    """For each row the scale of its group of so many rows."""
    peaks = [np.abs(x[at : at + size]).max() for at in range(0, len(x), size)]
    return np.asarray(np.repeat(peaks, size)[: len(x)] / 7)


def paper(q: Array, k: Array) -> tuple[Array, Array]:
    """Estimates of all scores less the products with the mean key, and how far off they may be.

    Means over the whole sequence are subtracted from Q and K; a scale for every pair of rows of Q,
    and four for every 32 keys; the product of Q's mean is added back.
    """
    mean_q, centred_k = q.mean(0), k - k.mean(0)
    q_scales, k_scales = by_groups(q - mean_q, 2), by_groups(centred_k, 8)
    qq, kk = quantized(q - mean_q, q_scales), quantized(centred_k, k_scales)
    estimates = SCALE * (qq @ kk.T + centred_k @ mean_q)
    return estimates, off(qq, q_scales, centred_k, k_scales)


def off(qq: Array, q_scales: Array, k: Array, k_scales: Array) -> Array:
    """Half a step in every channel of either."""
    of_q = np.outer(q_scales / 2, np.abs(k).sum(1))
    return np.asarray(SCALE * (of_q + np.outer(np.abs(qq).sum(1), k_scales / 2)))


def here(q: Array, k: Array) -> Array:
    """How far off this package's may be: a scale a row of Q and 16 keys, Q's mean left in."""
    centred_k = k - k.mean(0)
    q_scales = np.abs(q).max(1) / 7
    return off(quantized(q, q_scales), q_scales, centred_k, by_groups(centred_k, 16))


@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_what_the_papers_rule_does_up_to_quantization(seed: int) -> None:
    length = 1472
    q3, k3, _ = step(seed, length, length, heads=1)
    q, k = q3[:, 0].double().numpy(), k3[:, 0].double().numpy()
    estimates, paper_off = paper(q, k)
    exact = SCALE * q @ k.T
    doubt = np.maximum(paper_off, here(q, k))
    # What the estimates leave out is constant in a row and cancels.
    constant = SCALE * q @ k.mean(0)
    tiles = select(q3, k3, [PAPER], SCALE)
    alike = both = judged = 0
    for block, (start, _, end) in enumerate(tiles.blocks):
        row = set(tiles.row(0, block).tolist())
        local = max(0, start - 256) // 32
        near = [*range(0, 32), *range(local * 32, end)]
        kept, margins = set(), dict[int, list[tuple[float, float]]]()
        for i in range(start, end):
            s = np.array([exact[i, j] for j in near if j <= i])
            threshold = math.log(PAPER.tau * np.exp(s - s.max()).sum()) + s.max()
            for tile in range(1, local):
                its = slice(32 * tile, 32 * tile + 32)
                if (estimates[i, its] > threshold - constant[i]).any():
                    kept.add(tile)
                margins.setdefault(tile, []).append(
                    (exact[i, its].max() - threshold, doubt[i, its].max())
                )
        for tile, of_rows in margins.items():
            margin, width = max(m for m, _ in of_rows), max(w for _, w in of_rows)
            if margin > width:
                assert tile in kept and tile in row
            if margin < -width:
                assert tile not in kept and tile not in row
            judged += 1
            alike += (tile in kept) == (tile in row)
            both += tile in kept
        always = {j // 32 for j in near}
        assert always <= row
    assert alike > 0.9 * judged
    assert 0.05 * judged < both < 0.95 * judged, "the case shows nothing"
