"""How vLLM's layers turn queries and keys. Imports vLLM only through the model it is given.

Seen with vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_sparse_backend.compat import layer_index
from vllm_sparse_backend.errors import SparsePrefillError


def rotations(model: Any) -> dict[int, tuple[torch.Tensor, bool]]:
    """Of each layer whose attention has RoPE: radians a token by channel pair, fp32 on the host,
    and whether pairs are neighbours. ``model``: the module that vLLM runs.

    Raises SparsePrefillError for a kind whose angles do not grow with the position alone.
    """
    found = {}
    for name, module in model.named_modules():
        rotary = getattr(module, "rotary_emb", None)
        if rotary is None:
            continue
        # Its own table is in the model's dtype, in which an angle is off by more than a turn.
        table = getattr(rotary, "_compute_cos_sin_cache", None)
        if table is None or not hasattr(rotary, "is_neox_style"):
            raise SparsePrefillError(
                f"layer {name!r}: want a RoPE with one table of angles, got {type(rotary).__name__}"
            )
        with torch.inference_mode():
            cos, sin = table()[1].float().cpu().chunk(2)
        found[layer_index(name)] = torch.atan2(sin, cos), not rotary.is_neox_style
    return found
