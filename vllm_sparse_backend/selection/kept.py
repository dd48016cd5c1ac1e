"""What a list selector's heads compute: what it keeps and what every selector owes, checked."""

from __future__ import annotations

import torch

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.view import View


@torch.no_grad()
def kept_tiles(policy: ListSelector, view: View) -> torch.Tensor:
    """The tiles of each head and q block of the view, bool [G, blocks, tiles].

    Sink, local and diagonal tiles are in, nothing that is not causal is, whatever ``keep`` says.
    Raises SelectorError if it returns something else than what it owes; what it raises itself
    passes through with a note.
    """
    try:
        kept = policy.keep(view)
    except Exception as error:
        error.add_note(f"in {_said(policy)}: keep, for heads {view.heads} of layer {view.layer}")
        raise
    want = (len(view.heads), len(view.blocks), view.num_tiles)
    device = view.q.device
    if not isinstance(kept, torch.Tensor):
        raise SelectorError(f"{_said(policy)}: keep: want a tensor, got {type(kept).__name__}")
    if kept.shape != want or kept.dtype != torch.bool or kept.device != device:
        raise SelectorError(
            f"{_said(policy)}: keep: want {list(want)} torch.bool on {device}, "
            f"got {list(kept.shape)} {kept.dtype} on {kept.device}"
        )
    return (kept | _always(policy, view)) & view.causal


def _always(policy: ListSelector, view: View) -> torch.Tensor:
    """Of all q blocks what `static.always_kept` is of one, bool [blocks, tiles]."""
    # `Windowed.window_at` of each block's end, where the tensors are.
    window = policy.local + (policy.growth_units * (view.starts + Q_BLOCK) >> 16)
    window = (view.starts - window).clamp(min=0)[:, None]
    first_key = torch.arange(view.num_tiles, device=view.q.device) * view.tile
    return (first_key < policy.sink) | (first_key + view.tile > window)


def _said(policy: ListSelector) -> str:
    kind = type(policy)
    return f"selector {policy.selector!r} ({kind.__module__}.{kind.__qualname__})"
