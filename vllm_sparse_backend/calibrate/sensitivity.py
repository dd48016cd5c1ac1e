"""How much a model's prediction minds an error in a head's output.

An error d in a row of a head's output moves the log probability of a token by g . d, where g is
that log probability's gradient. The KL divergence from the exact prediction is then half the mean
of (g . d)^2 over tokens drawn from it (the Fisher information; Amari, 1998), which for errors of no
particular direction is |g|^2 |d|^2 / 2D. The mean of |g|^2 / D tells heads apart by some orders of
magnitude, and is nearly the same in any text: in SmolLM2's source code, copies and key-value pairs
its logarithms correlate by 0.98 and more.

The gradient is taken in transformers, whose models vLLM's are made after: vLLM has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from vllm_sparse_backend.calibrate.table import Floats
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.profile import ModelFacts

TOKENS = 2048  # of text: some 3 GB of activations for SmolLM2
ROWS = 512  # of logits at a time


def sensitivities(
    folder: str,
    facts: ModelFacts,
    layers: Sequence[int],
    token_ids: Sequence[int],
    hf_overrides: dict[str, Any] | None,
    seed: int,
) -> Floats:
    """Of the heads of ``layers``: mean over rows of |g|^2 / D [L, H], g in nats per unit of output.

    In float32, on the CPU; deterministic under ``seed``, which draws the tokens. Raises
    SparsePrefillError if transformers cannot run the model, or shows no outputs of heads.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one of our own
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **(hf_overrides or {})
        ).eval()
    except (OSError, ValueError, ImportError) as error:
        raise SparsePrefillError(
            f"model {folder}: rule loss wants a gradient, and transformers cannot load it ({error})"
        ) from error
    model.requires_grad_(False)
    squares: dict[int, torch.Tensor] = {}
    hooks = [
        module.o_proj.register_forward_pre_hook(_collect(squares, module.layer_idx, facts))
        for module in model.modules()
        if hasattr(module, "o_proj") and hasattr(module, "layer_idx")
    ]
    try:
        _backward(model, token_ids, seed)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [layer for layer in layers if layer not in squares]
    if missing:
        raise SparsePrefillError(
            f"model {folder}: rule loss wants attention with an o_proj behind its heads in every "
            f"layer that can be sparse, got none in {missing}"
        )
    return np.stack([squares[layer].double().numpy() for layer in layers])


def _collect(squares: dict[int, torch.Tensor], layer: int, facts: ModelFacts) -> Any:
    wanted = facts.num_heads * facts.head_dim

    def before(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if (got := inputs[0].shape[-1]) != wanted:
            raise SparsePrefillError(
                f"layer {layer}: rule loss wants {facts.num_heads} heads of {facts.head_dim} "
                f"before o_proj, got {got} channels"
            )

        def gradient(g: torch.Tensor) -> None:
            by_head = g.view(-1, facts.num_heads, facts.head_dim)  # [T, H, D]
            squares[layer] = by_head.square().mean((0, 2))

        inputs[0].register_hook(gradient)

    return before


def _backward(model: Any, token_ids: Sequence[int], seed: int) -> None:
    """Of the summed log probabilities of tokens drawn from the model's prediction at each place:
    independent as they are, the square of the sum is in the mean the sum of the squares."""
    generator = torch.Generator().manual_seed(seed)
    embedded = model.get_input_embeddings()(torch.tensor([token_ids])).requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    cut = hidden.detach().requires_grad_()
    for rows in cut[0].split(ROWS):  # all logits at once would be gigabytes
        logits = model.get_output_embeddings()(rows)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
    hidden.backward(cut.grad)
