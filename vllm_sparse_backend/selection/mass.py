"""A tile's softmax mass relative to sink and local tiles, in plain torch: what kernels are held to.

The criterion is SALE's relative attention score (arXiv 2505.24179, section 3.2), summed over a
tile's keys before it is compared; the estimates are those of `estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vllm_sparse_backend.selection.estimate import by_tile, estimates
from vllm_sparse_backend.selection.policy import Mass


def exp_linear(x: torch.Tensor) -> torch.Tensor:
    """e^x, where 2^x is taken to be linear between powers of two: at most 6.2% too much.

    This is what the bits of an IEEE float are, so that a kernel gets it by converting to an
    integer. At most 2^123; a NaN counts as that.
    """
    x = (x / math.log(2)).nan_to_num(123.0, 123.0, -127.0).clamp(max=123.0)
    whole = x.floor()
    return torch.where(x < -126, 0.0, (1 + x - whole) * whole.exp2())


def margins(
    policy: Mass,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
    prompt_len: int | None = None,
    mean_of: int | None = None,
) -> list[torch.Tensor]:
    """By how much each tile's mass exceeds the threshold in its best row, as a difference of
    logarithms. Arguments and returns as `sale.margins`.
    """
    result = []
    for excess, always in estimates(policy, q, k, scale, blocks, prompt_len, mean_of):
        mass = by_tile(exp_linear(excess), policy.tile, 0.0).sum(2)
        best = mass.amax(0).log()
        result.append(best.masked_fill(always | (policy.tau == 0), torch.inf))
    return result


def keep(
    policy: Mass,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
    prompt_len: int | None = None,
    mean_of: int | None = None,
) -> list[torch.Tensor]:
    """The kept tiles of each q block, bool [causal tiles] each; arguments as ``margins``."""
    return [~(margin <= 0) for margin in margins(policy, q, k, scale, blocks, prompt_len, mean_of)]
