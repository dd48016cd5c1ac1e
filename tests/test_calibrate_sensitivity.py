"""What the gradient predicts of an error in a head, against what the error does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import token_ids

from vllm_sparse_backend.calibrate.sensitivity import sensitivities
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.profile import ModelFacts

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)
IDS = token_ids(3, 1024)
NOISE = 0.03  # of a head's own size


@torch.inference_mode()
def _predictions(model: Any, disturbed: tuple[int, int] | None) -> tuple[torch.Tensor, float]:
    """Log probabilities [T, V], and the mean square of the noise put on a head's output."""
    added = 0.0

    def disturb(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal added
        head = inputs[0].unflatten(2, (4, 64))[:, :, disturbed[1]]  # type: ignore[index]
        torch.manual_seed(5)
        noise = NOISE * head.square().mean().sqrt() * torch.randn_like(head)
        added = float(noise.square().sum(2).mean())
        head += noise
        return inputs

    hook = None
    if disturbed is not None:
        module = model.model.layers[disturbed[0]].self_attn.o_proj
        hook = module.register_forward_pre_hook(disturb)
    logits = model(torch.tensor([IDS])).logits[0]
    if hook:
        hook.remove()
    return logits.double().log_softmax(1), added


def test_predicted_divergence_is_what_noise_in_a_head_gives(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = sensitivities(str(tiny_llama), FACTS, [0, 1], IDS, None, seed=1)
    assert found.shape == (2, 4) and (found > 0).all()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    exact, _ = _predictions(model, None)
    for place in np.ndindex(2, 4):
        moved, square = _predictions(model, (int(place[0]), int(place[1])))
        nats = float((exact.exp() * (exact - moved)).sum(1).mean())
        assert 0.5 * found[place] * square == pytest.approx(nats, rel=0.25), place


def test_a_sensitivity_is_of_the_layers_asked_for_and_of_the_seed(tiny_llama: Path) -> None:
    both = sensitivities(str(tiny_llama), FACTS, [0, 1], IDS[:256], None, seed=1)
    last = sensitivities(str(tiny_llama), FACTS, [1], IDS[:256], None, seed=1)
    np.testing.assert_array_equal(last, both[1:])
    other = sensitivities(str(tiny_llama), FACTS, [0, 1], IDS[:256], None, seed=2)
    assert (other != both).all()


def test_what_transformers_cannot_do_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsePrefillError, match=r"wants attention with .* none in \[7\]"):
        sensitivities(str(tiny_llama), FACTS, [0, 7], IDS[:64], None, seed=1)
    more = FACTS.model_copy(update={"num_heads": 8})
    with pytest.raises(
        SparsePrefillError, match=r"layer 0: rule loss wants 8 heads of 64 .* got 256"
    ):
        sensitivities(str(tiny_llama), more, [0], IDS[:64], None, seed=1)
    odd = shutil.copytree(tiny_llama, tmp_path / "odd")
    (odd / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(SparsePrefillError, match="transformers cannot load it"):
        sensitivities(str(odd), FACTS, [0], IDS[:64], None, seed=1)
