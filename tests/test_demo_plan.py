"""Which servers the demo starts for which lengths, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from vllm_sparse_backend.demo import machine
from vllm_sparse_backend.demo.model import ModelUnavailable
from vllm_sparse_backend.demo.plan import (
    LENGTHS,
    Facts,
    LengthRefused,
    Plan,
    default_lengths,
    make_plan,
    read_facts,
)
from vllm_sparse_backend.demo.serve import Side
from vllm_sparse_backend.errors import ConfigError

PACKAGED = Facts(max_positions=8192, vocabulary=49152, scalable=True)
OTHER = Facts(max_positions=32768, vocabulary=262144, scalable=False)
MODEL = Path("models/some-model")


def plan(facts: Facts = PACKAGED, **arguments: object) -> Plan:
    return make_plan(MODEL, facts, **{"lengths": LENGTHS, "threads": 2, **arguments})  # type: ignore[arg-type]


def test_only_lengths_beyond_the_models_own_are_scaled() -> None:
    near, far = plan().setups
    assert (near.lengths, near.scaled, near.options.hf_overrides) == (
        (1024, 4096, 8192),
        False,
        None,
    )
    assert (far.lengths, far.scaled, far.options.max_model_len) == ((16384,), True, 16384)
    assert far.options.hf_overrides is not None
    # Without it vLLM scales nothing and says nothing.
    assert far.options.hf_overrides["rope_parameters"]["max_trained_positions"] == 8192


def test_both_sides_differ_in_the_backend_and_its_configuration_only() -> None:
    options = plan(sparse_config={"min_prompt_tokens": 1000}).setups[0].options
    dense, sparse = options.arguments("dense", 8000), options.arguments("sparse", 8000)
    assert sparse[-2:] == ["--additional-config", '{"sparse_prefill":{"min_prompt_tokens":1000}}']
    differing = [pair for pair in zip(dense, sparse, strict=False) if pair[0] != pair[1]]
    assert differing == [("CPU_ATTN", "sparse_prefill")]


def test_only_a_quick_demo_skips_vllms_compilation() -> None:
    for quick in (True, False):
        for side in get_args(Side):
            arguments = plan(quick=quick).setups[0].options.arguments(side, 8000)
            assert ("--enforce-eager" in arguments) is quick


@pytest.mark.parametrize(
    ("facts", "lengths", "message"),
    [
        (PACKAGED, [32768], "8192 positions, and up to 16384 with RoPE scaling"),
        (OTHER, [65536], "32768 positions; scaling its RoPE takes --hf-overrides"),
        (OTHER, [100], "length 100: want at least 512"),
        (OTHER, [-4096], "length -4096: want at least 512"),
    ],
)
def test_lengths_a_model_cannot_take_are_refused(
    facts: Facts, lengths: list[int], message: str
) -> None:
    with pytest.raises(LengthRefused, match=message):
        plan(facts, lengths=lengths)


def test_overrides_of_the_user_serve_all_lengths() -> None:
    overrides = {"max_position_embeddings": 65536}
    (only,) = plan(OTHER, lengths=[4096, 65536], hf_overrides=overrides).setups
    assert only.options.hf_overrides == overrides
    with pytest.raises(LengthRefused, match="65536 positions"):
        plan(OTHER, lengths=[70000], hf_overrides=overrides)
    # Nor is the packaged model's own scaling mixed with them.
    with pytest.raises(LengthRefused, match="8192 positions"):
        plan(PACKAGED, lengths=[16384], hf_overrides={"rope_theta": 1.0})


def test_a_wrong_configuration_is_refused_before_any_start() -> None:
    with pytest.raises(ConfigError, match="min_prompt_token"):
        plan(sparse_config={"min_prompt_token": 1})


def test_default_lengths_end_where_the_model_does() -> None:
    assert default_lengths(PACKAGED, 8192, quick=False) == list(LENGTHS)
    assert default_lengths(Facts(5000, 100, False), 5000, quick=False) == [1024, 4096]
    assert default_lengths(Facts(800, 100, False), 800, quick=True) == [800]


@pytest.mark.parametrize(
    ("prompt", "chunk", "sparse"),
    [
        (1000, 2048, False),
        (2047, 2048, False),
        (2048, 2048, True),
        (2100, 2040, False),  # the second step is too short a query: 60 tokens
        (2104, 2040, True),
        (16000, 256, True),
    ],
)
def test_which_prompts_ought_to_run_sparsely(prompt: int, chunk: int, sparse: bool) -> None:
    assert plan(chunk_tokens=chunk).is_sparse(prompt) is sparse
    assert not plan(sparse_config={"enabled": False}).is_sparse(prompt)


def test_a_large_vocabulary_has_smaller_steps() -> None:
    assert plan(PACKAGED).setups[0].options.chunk_tokens == 2048
    assert plan(OTHER, lengths=[4096]).setups[0].options.chunk_tokens == 1024


def test_facts_come_from_the_models_config(tmp_path: Path, smollm2: Path) -> None:
    assert read_facts(smollm2, packaged=True) == PACKAGED
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(ModelUnavailable, match="configuration cannot be read"):
        read_facts(tmp_path, packaged=False)


def test_the_dtype_is_what_the_machine_multiplies_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, want in [
        ("fpu avx2 fma", "float32"),
        ("fpu avx2 avx512f avx512_bf16", "bfloat16"),
        (None, "bfloat16"),  # unknown: what the model has
    ]:
        text = "model name : some CPU\n" + (f"flags : {flags}\n" if flags else "")
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(text)
        monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
        assert machine.fast_dtype() == want
    with monkeypatch.context() as patch:  # whatever the CPU beside it
        cpuinfo.write_text("flags : fpu avx2 fma\n")
        patch.setattr(machine, "gpu", lambda: "NVIDIA A100-SXM4-80GB")
        assert machine.fast_dtype() == "bfloat16"
        assert machine.this_machine().describe().startswith("NVIDIA A100-SXM4-80GB; ")
    options = plan(dtype="float32").setups[0].options
    sides: tuple[Side, Side] = ("dense", "sparse")
    for side in sides:
        arguments = options.arguments(side, 1)
        assert arguments[arguments.index("--dtype") + 1] == "float32"
