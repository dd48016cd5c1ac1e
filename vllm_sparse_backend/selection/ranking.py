"""The highest of some scores, the same ones wherever and however often they are asked for."""

from __future__ import annotations

import torch


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which are the ``count`` highest along the last dimension: bool, of the scores' shape.

    Of equal scores the earlier ones win, so that more are never other ones. ``-inf`` is never
    among them; a NaN always is, and takes nobody's place.
    """
    unknown = scores.isnan()
    known = scores.masked_fill(unknown, -torch.inf)
    if count < scores.shape[-1]:
        order = known.argsort(dim=-1, descending=True, stable=True)[..., :count]
        kept = torch.zeros_like(unknown).scatter_(-1, order, True)
    else:
        kept = torch.ones_like(unknown)
    return (kept & (known > -torch.inf)) | unknown
