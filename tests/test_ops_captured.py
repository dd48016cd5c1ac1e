"""The ops on what attention really looks like: queries, keys and values of a pretrained model."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import (
    QKV,
    assert_accurate,
    causal_mask,
    element_mask,
    make_paged,
    needs_core,
    plain,
    run,
)
from _tiles import assert_same_tiles, recall

from vllm_sparse_backend.ops import select_tiles
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, Sale, Static

TOKENS = 2500
LAYERS = (0, 4, 11)
SCALE = 0.125
HEADS = 9


@pytest.fixture(scope="module")
def captured(smollm2: Path) -> dict[int, QKV]:
    """By layer: q [2500, 9, 64], k and v [2500, 3, 64] in bf16, after RoPE, on Python's manual."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama

    text = importlib.resources.files("pydoc_data").joinpath("topics.py").read_text("utf-8")
    tokens = AutoTokenizer.from_pretrained(smollm2)(
        text[: 8 * TOKENS], return_tensors="pt"
    ).input_ids
    model: Any = AutoModelForCausalLM.from_pretrained(
        smollm2, num_hidden_layers=LAYERS[-1] + 1, dtype=torch.float32
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    values: list[torch.Tensor] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def keep_rotated(*arguments: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(rotate(*arguments, **more))
        return seen[-1]

    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", keep_rotated)
        model.model(tokens[:, :TOKENS], use_cache=False)
    assert len(seen) == len(values) == LAYERS[-1] + 1

    def plainly(x: torch.Tensor) -> torch.Tensor:
        return x.clone().to(torch.bfloat16)

    return {
        layer: (
            plainly(seen[layer][0][0].transpose(0, 1)),
            plainly(seen[layer][1][0].transpose(0, 1)),
            plainly(values[layer][0].view(TOKENS, 3, 64)),
        )
        for layer in LAYERS
    }


@needs_core
@pytest.mark.parametrize(
    ("layer", "dtype"), [(layer, torch.bfloat16) for layer in LAYERS] + [(4, torch.float32)]
)
def test_the_core_chooses_the_tiles_of_the_reference(
    captured: dict[int, QKV], layer: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in captured[layer])
    paged = make_paged([(q[-320:], k, v)])
    for policy in (
        UNIFORM_DEFAULT,
        Sale(tau=0.02, bits=4, tile=64, row_stride=1),
        Sale(tau=0.004, bits=8, tile=32, sink=16, local=64, row_stride=8),
    ):
        policies = [policy] * HEADS
        own, other = (select_tiles(*paged.tensors, policies, impl=i) for i in ("cpu", "reference"))
        ties = assert_same_tiles(own, other, (q[-320:], k, v), policies, SCALE)
        assert ties <= 0.001 * sum(own.causal)


@needs_core
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_on_real_text(captured: dict[int, QKV], layer: int) -> None:
    """Keeping all is dense; the default keeps its share of the mass and stays close to dense."""
    q, k, v = captured[layer]
    qkv = (q[-320:], k, v)
    paged = make_paged([qkv])
    causal = causal_mask(320, TOKENS)
    assert_accurate(run(paged, DENSE, "cpu")[0], qkv, causal)
    dense = plain(q[-320:].double(), k.double(), v.double(), causal)

    def measure(policy: Sale | Static) -> tuple[float, float, float]:
        out, stats = run(paged, policy, "cpu")
        tiles = select_tiles(*paged.tensors, policy, impl="cpu")
        assert_accurate(out, qkv, element_mask(tiles))
        mass = torch.stack([recall(qkv, tiles, head, SCALE) for head in range(HEADS)])
        error = float((out.double() - dense).abs().sum() / dense.abs().sum())
        return sum(stats.density) / HEADS, float(mass.mean()), error

    density, mass, error = measure(UNIFORM_DEFAULT)
    assert density < 1
    assert mass > 0.96
    assert error < 0.03
    # And by choosing: sink and window alone, which it starts from, leave far more out.
    _, window_mass, window_error = measure(Static(sink=64, local=256))
    assert 1 - mass < (1 - window_mass) / 3
    assert error < window_error / 3
