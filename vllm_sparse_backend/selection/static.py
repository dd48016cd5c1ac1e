"""The tiles every sparse selector keeps whatever the scores say: sink and local window.

They are all there is to ``Static`` (MInference's A-shape, arXiv 2407.02490, section 3.2;
with ``growth``, MoA's spans, arXiv 2406.14909), and what ``Sale`` and ``Mass`` measure the
others by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_sparse_backend.selection.policy import Q_BLOCK, Static, Windowed


def always_kept(policy: Windowed, start: int, end: int) -> torch.Tensor:
    """Sink and local tiles of one q block, bool [causal tiles].

    ``start`` is the block's aligned position, ``end`` the position after its last present
    row; tiles are ``policy.tile`` keys, aligned at position 0. The window is laid before
    ``start``, not before the first present row, and is as wide as for a whole block, so that it
    does not move with the way a prompt is cut into chunks.
    """
    local = policy.window_at(start + Q_BLOCK)
    first_key = torch.arange(0, end, policy.tile)
    return (first_key < policy.sink) | (first_key + policy.tile > max(0, start - local))


def keep(policy: Static, blocks: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """The kept tiles of each ``(start, first, end)`` q block, bool [causal tiles] each."""
    return [always_kept(policy, start, end) for start, _, end in blocks]
