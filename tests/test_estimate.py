"""`vllm-sparse estimate`: the sums, and a prediction for a model that is only a configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _models import make_llama
from _report_records import FACTS, measurement, profile, save_both
from typer.testing import CliRunner

from vllm_sparse_backend.calibrate.results import measurement_of
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.ops.tiles import causal_tiles, q_blocks
from vllm_sparse_backend.ops.triton import cost as gpu_cost
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.report.estimate import Estimate, origin
from vllm_sparse_backend.report.estimation import seconds
from vllm_sparse_backend.report.measured import densities, find
from vllm_sparse_backend.report.prediction import (
    Subject,
    break_even,
    count_policies,
    expected_density,
    layer_parameters,
    predict,
)
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static, static
from vllm_sparse_backend.target import Cpu, Gpu

WIDE = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128
)

AVX512 = Cpu("avx512_bf16")


def subject(policy: AnyPolicy = Mass(), **more: Any) -> Subject:  # noqa: B008  (frozen)
    fields: dict[str, Any] = {
        "facts": WIDE, "target": AVX512, "dtype": "bfloat16", "threads": 1,
        "chunk_tokens": 2048, "min_prompt_tokens": 2048, "parameters": 7_000_000_000,
        "policies": {policy: 32 * 32}, "windows": [],
    }  # fmt: skip
    return Subject(**fields | more)


def test_dense_attention_is_the_cost_model_s_whatever_the_chunks() -> None:
    row = predict(subject(DENSE), 8192)
    whole = 32 * cost.base_seconds("avx512_bf16", 8192, 8192, 32, 128)
    assert row.base == pytest.approx(whole)
    assert row.sparse == pytest.approx(row.keep_all)
    assert row.density == 1.0
    calls = 4 * 32 * cost.RATES["avx512_bf16"].call_seconds
    assert row.keep_all - calls == pytest.approx(whole * 200 / 400)


def test_sparse_attention_is_selection_and_what_is_kept() -> None:
    policy = Sale(tail=0)
    row = predict(subject(policy, min_prompt_tokens=1), 16384)
    assert row.sparse < row.keep_all < row.base
    expected = expected_density(policy, 16384)
    assert row.density == pytest.approx(expected, rel=0.02)
    one = cost.sparse_seconds("avx512_bf16", policy, 16384, 16384, 1024, 128, expected)
    assert row.sparse == pytest.approx(one, rel=0.03)  # the calls, and the first steps' densities


def test_what_is_too_short_is_not_sparse() -> None:
    short = predict(subject(), 1024)
    assert short.sparse == pytest.approx(min(short.keep_all, short.base))
    assert short.density == 1.0
    assert predict(subject(min_prompt_tokens=1 << 20), 65536).density == 1.0


def test_dense_layers_and_windows_count_as_cpu_attn() -> None:
    half = subject(policies={Mass(): 16 * 32}, windows=[None] * 16)
    row, all_sparse = predict(half, 16384), predict(subject(), 16384)
    assert row.base == pytest.approx(all_sparse.base)
    assert row.sparse == pytest.approx((all_sparse.base + all_sparse.sparse) / 2)
    windowed = predict(replace(half, windows=[512] * 16), 16384)
    assert windowed.sparse < row.sparse
    # What each row of a window sees, added up.
    pairs = sum(min(at, 512) for at in range(1, 16385))
    saved = 16 * 4 * 32 * 128 * (16384 * 16385 / 2 - pairs) / 200 * 1e-9
    assert row.base - windowed.base == pytest.approx(saved)


def test_threads_share_and_matrix_products_are_the_rest() -> None:
    one, eight = predict(subject(), 8192), predict(subject(threads=8), 8192)
    assert eight.sparse == pytest.approx(one.sparse / 8)
    assert one.rest == pytest.approx(2 * 7e9 * 8192 / 440e9)
    assert one.rest is not None and one.dense_ttft == one.base + one.rest
    assert one.dense_share == pytest.approx(one.base / one.dense_ttft)
    assert one.sparse_share < one.dense_share < predict(subject(), 65536).dense_share


def test_densities_are_the_measurement_s_where_there_is_one() -> None:
    made = profile()
    rows = [made.for_layer(layer) for layer in range(1, 4)]
    measured = subject(
        facts=FACTS, policies=count_policies(rows), windows=[None], min_prompt_tokens=1,
        chunk_tokens=8192, measurement=measurement(made),
    )  # fmt: skip
    known = densities(measurement(made), 8192)
    mean = sum(known.values()) / len(known)
    assert predict(measured, 8192).density == pytest.approx(mean)
    # In steps as well: their sum is what a whole prompt keeps, but for the first, kept whole.
    assert predict(replace(measured, chunk_tokens=1024), 8192).density == pytest.approx(
        mean, rel=0.05
    )


@pytest.mark.parametrize("policy", [Static(local=512), Static(local=64, growth=0.1)])
def test_a_window_s_expected_density_is_what_it_keeps(policy: Static) -> None:
    blocks = q_blocks(8192, 8192)
    kept = sum(int(row.sum()) for row in static.keep(policy, blocks))
    exact = kept / sum(causal_tiles(block.end, policy.tile) for block in blocks)
    assert expected_density(policy, 8192) == pytest.approx(exact, rel=0.02)


def test_expected_densities_fall_with_the_length_to_the_share_kept() -> None:
    found = [expected_density(Mass(), tokens) for tokens in (256, 2048, 16384, 131072)]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0 and found[-1] == pytest.approx(cost.EXPECTED_KEPT, abs=0.01)
    assert expected_density(DENSE, 8192) == expected_density(Sale(tau=0), 8192) == 1.0


@pytest.mark.parametrize("isa", list(cost.RATES))
def test_it_breaks_even_where_the_prediction_says_so(isa: str) -> None:
    target = Cpu(isa)
    least = break_even(subject(target=target, min_prompt_tokens=1))
    assert least is not None and least % 64 == 0
    row = predict(subject(target=target, min_prompt_tokens=1), 2 * least)
    assert row.sparse < min(row.keep_all, row.base)
    later = break_even(subject(target=target, min_prompt_tokens=50_000))
    assert later is not None and 49_900 < later < 50_200
    assert break_even(subject(DENSE, target=target)) is None


def test_parameters_are_those_of_a_llama_like_block() -> None:
    llama8b = SimpleNamespace(hidden_size=4096, intermediate_size=14336)
    assert layer_parameters(llama8b, WIDE) == 6_979_321_856  # 8.03e9 less embeddings and norms
    experts = SimpleNamespace(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8
    )
    facts = WIDE.model_copy(update={"num_layers": 48, "num_kv_heads": 4})
    assert layer_parameters(experts, facts) == 48 * (2 * 2048 * 128 * 36 + 3 * 2048 * 768 * 8)
    uneven = SimpleNamespace(hidden_size=64, intermediate_size=[100, 300])
    assert layer_parameters(uneven, FACTS) == 4 * (2 * 64 * 64 * 6 + 3 * 64 * 200)


def test_seconds_have_three_figures() -> None:
    assert [seconds(s) for s in (0.123, 4.56, 78.9, 1234.5)] == ["0.12", "4.56", "78.9", "1,234"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4096,many"], "--lengths: want numbers"),
        (["--lengths", "0"], "--lengths: want numbers"),
        (["--target", "avx1024"], "--target: want one of avx512_bf16, "),
        (["--profile", "no/such.json"], "no/such.json"),
    ],
)
def test_what_is_wrong_is_named_before_vllm_is_asked(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["estimate", "no/such/model", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def fresh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "from vllm_sparse_backend.cli import app; app()"
    command = [sys.executable, "-c", code, "estimate", *arguments]
    env = {**os.environ, **variables}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=480, check=False
    )


def test_what_is_switched_off_is_predicted_all_the_same(tmp_path: Path) -> None:
    arguments = [str(make_llama(tmp_path / "llama")), "--lengths", "8192", "--json"]
    off, on = fresh(*arguments, VLLM_SPARSE_PREFILL_ENABLED="false"), fresh(*arguments)
    assert off.returncode == 0 == on.returncode, off.stderr
    assert json.loads(off.stdout)["rows"] == json.loads(on.stdout)["rows"]


def test_a_model_without_weights_is_predicted(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    facts = FACTS.model_copy(update={"num_layers": 2})
    path = save_both(tmp_path, profile(facts=facts))
    done = fresh(
        str(model), "--profile", str(path), "--target", "avx512_bf16", "--lengths", "4096,16384",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [row["length"] for row in made["rows"]] == [4096, 16384]
    assert (made["isa"], made["dtype"]) == ("avx512_bf16", "bfloat16")
    assert made["sparse_layers"] == 2 and made["dense_layers"] == {}
    assert made["density_from"].startswith("measured from 2,048 to 8,192 tokens")
    # 256 wide: q and o 4 heads, k and v 2 of 64; 3 matrices to 512.
    assert made["parameters"] == 2 * (2 * 256 * 64 * 6 + 3 * 256 * 512)
    assert made["matmul_measured"] is True
    for row in made["rows"]:
        assert row["sparse"] < row["keep_all"] < row["base"]


def gpu_subject(policy: AnyPolicy = Mass(), arch: str = "sm_90", **more: Any) -> Subject:  # noqa: B008
    return subject(policy, target=Gpu(arch, 4), **more)


def test_a_gpus_row_is_a_range_and_says_nothing_of_the_rest() -> None:
    row = predict(gpu_subject(Sale(tail=0)), 65536)
    assert row.rest is None
    assert row.sparse_best is not None and row.keep_all_best is not None
    assert row.sparse_best < row.sparse < row.keep_all and row.keep_all_best < row.keep_all
    whole = 32 * gpu_cost.dense_seconds("sm_90", 65536, 65536, 32, 128)
    assert row.base == pytest.approx(whole)
    # Up to `min_prompt_tokens` the base backend computes.
    short = predict(gpu_subject(), 1024)
    assert short.sparse == short.base == short.sparse_best and short.density == 1.0
    # Windows are the base's, as on CPUs.
    half = gpu_subject(policies={Mass(): 16 * 32}, windows=[512] * 16)
    assert predict(half, 65536).base < 0.52 * row.base


def test_where_no_layer_can_be_sparse_any_head_dim_is_predicted() -> None:
    facts = WIDE.model_copy(update={"head_dim": 72})
    for target in (AVX512, Gpu("sm_90", 4)):
        row = predict(subject(facts=facts, target=target, policies={}, windows=[None] * 32), 8192)
        assert row.base == row.keep_all == row.sparse > 0


def test_a_gpu_breaks_even_against_its_dense_attention() -> None:
    worse, better = (break_even(subject(target=end)) for end in reversed(Gpu("sm_90", 4).ends))
    assert worse is not None and better is not None and better <= worse
    row = predict(gpu_subject(), 2 * worse)
    assert row.sparse < row.base
    # Half of the tiles by this kernel, not tuned for B200, take longer than FlashAttention 4.
    assert break_even(gpu_subject(arch="sm_100")) is None


def test_of_a_gpu_everything_is_called_a_prediction(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    done = fresh(str(model), "--target", "sm_90", "--lengths", "4096,65536", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["isa"], made["base"], made["timed"]) == ("sm_90", "FA3", False)
    assert made["whose"] == "one H100 (sm_90), PREDICTED and never timed on hardware"
    assert made["matmul_rate"] is None and made["core_from"] is None
    for row in made["rows"]:
        assert row["rest"] is None and row["sparse_best"] < row["sparse"]
    shown = Estimate.model_validate(made)
    assert "PREDICTED, never timed on hardware" in shown.title()
    said = "\n".join(shown.notes())
    for words in (
        "predicted to pay at no length at the worse end, from ", "published peaks",
        "TTFT, and attention's share of it, are not", "Chunks of 8192",
        "the truth may lie above either end", "FA3's rate is its published one",
    ):  # fmt: skip
        assert words in said
    assert "CPU_ATTN" not in said and "thread" not in said
    never = shown.model_copy(update={"break_even": None, "break_even_best": None})
    assert "predicted to pay at no length, at either end" in never.notes()[0]
    printed = fresh(str(model), "--target", "sm_90", "--lengths", "65536")
    assert printed.returncode == 0, printed.stderr
    table = printed.stdout.split("Following")[0]
    assert "milliseconds" in table and "PREDICTED, never timed on" in table
    assert "TTFT" not in table and table.rstrip().splitlines()[-1].count(" to ") == 3
    for arguments, words in (
        (("--threads", "4"), "--threads: want it with a CPU's --target, got it with sm_90"),
        (("--dtype", "float32"), "of sm_90 bfloat16 and float16 are predicted, got float32"),
    ):
        refused = fresh(str(model), "--target", "sm_90", *arguments)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr


def test_the_notes_say_what_the_figures_rest_on() -> None:
    made = Estimate(
        model="m", facts=WIDE, policies="profile p", isa="avx512", whose="one thread with avx512",
        timed=True, dtype="bfloat16", threads=1,
        chunk_tokens=2048, positions=8192, parameters=7_000_000_000, matmul_rate=85,
        matmul_measured=False, density_from="expected", sparse_layers=16,
        dense_layers={"sliding_window": 15, "sinks": 1}, core_from=128, break_even=2048,
        rows=[predict(subject(), length) for length in (4096, 16384, 32768)],
    )  # fmt: skip
    said = "\n".join(made.notes())
    for words in (
        "pays from 2,048 tokens on", "7,000 million weights", "85 GFLOP/s a thread (predicted)",
        "16 can be sparse, dense by CPU_ATTN: 15 sliding_window, 1 sinks.",
        "The model has 8,192 positions: prompts from 16,384 tokens on need its RoPE scaled.",
    ):  # fmt: skip
        assert words in said
    never = made.model_copy(update={"break_even": None, "positions": 1 << 20})
    assert "pays at no length" in never.notes()[0] and "positions" not in "".join(never.notes())


def test_a_density_s_origin_is_named(tmp_path: Path) -> None:
    path = save_both(tmp_path, profile())
    assert origin(find(profile(), path)).startswith("measured from 2,048 to 8,192 tokens")
    measurement_of(path).unlink()
    expected = origin(find(profile(), path))
    assert "expected, 0.5 of the tiles beyond sink and window" in expected
    assert "no measurement beside the profile" in expected


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    path = save_both(tmp_path, profile())
    done = fresh(str(model), "--profile", str(path))
    assert done.returncode == 2
    assert "num_layers: the profile has 4, the model 2" in done.stderr
