"""SALE's relative attention score in plain torch: the rule the kernels are held to.

Source: SALE, arXiv 2505.24179, section 3.2; the estimates are those of `estimate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse_backend.selection.estimate import by_tile, estimates
from vllm_sparse_backend.selection.policy import Sale


def margins(
    policy: Sale,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
    prompt_len: int | None = None,
    mean_of: int | None = None,
) -> list[torch.Tensor]:
    """By how much each tile's best score estimate exceeds its row's threshold, in nats.

    Arguments as in `estimate.estimates`. Returns fp32 [causal tiles] per block: +inf where a
    tile is always kept or ``tau`` is 0, NaN where an input was not finite.

    A margin within fp32 rounding of 0 may come out on either side of it in another
    implementation, because m and l are sums whose order is free.
    """
    result = []
    for excess, always in estimates(policy, q, k, scale, blocks, prompt_len, mean_of):
        best = by_tile(excess, policy.tile, -torch.inf).amax((0, 2))
        result.append(best.masked_fill(always | (policy.tau == 0), torch.inf))
    return result


def keep(
    policy: Sale,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int, int]],
    prompt_len: int | None = None,
    mean_of: int | None = None,
) -> list[torch.Tensor]:
    """The kept tiles of each q block, bool [causal tiles] each; arguments as ``margins``.

    Written as "not at most 0", so that NaN keeps a tile: with inputs that are not finite
    nothing is known about it.
    """
    return [~(margin <= 0) for margin in margins(policy, q, k, scale, blocks, prompt_len, mean_of)]
