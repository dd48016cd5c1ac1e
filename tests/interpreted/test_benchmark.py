"""loadtest/kernels.py with the Triton kernels: that it runs, since its times mean nothing here."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from typer.testing import CliRunner

from vllm_sparse_backend.backend import cuda_flash
from vllm_sparse_backend.ops.triton import work
from vllm_sparse_backend.selection import DENSE, Static


@pytest.fixture(scope="module")
def loadtest() -> Iterator[dict[str, Any]]:
    """The scripts as modules; loadtest/ is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "loadtest"))
        names = ("kernels", "inputs", "contenders", "machines", "measure")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture
def layer(loadtest: dict[str, Any]) -> Any:
    inputs = loadtest["inputs"]
    whole = inputs.random_layer(inputs.Shape(4, 2, 64), 150, torch.bfloat16, 0)
    return inputs.Step(80, 150, 1.0).of(whole)


def test_the_command(loadtest: dict[str, Any], tmp_path: Path) -> None:
    kernels = loadtest["kernels"]
    app = kernels.typer.Typer()
    app.command()(kernels.main)
    file = tmp_path / "report.json"
    case = ["--impl", "triton", "--shape", "smollm2", "--length", "128", "--repeats", "1"]
    policy = ["--policy", '{"selector": "static", "local": 0}']
    result = CliRunner().invoke(app, [*case, *policy, "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert (report["impl"], report["isa"]) == ("triton", "interpreter")
    dense, window, sdpa = report["cases"][0]["results"]
    assert dense["error"]["relative_l1"] < 0.01
    assert 0 < window["density"] <= 1
    assert window["select_seconds"] > 0 < window["attend_seconds"]
    assert dense["ratio"].keys() == {"SDPA"} and sdpa["name"] == "SDPA"


def test_what_is_timed_waits_for_nothing_and_plans_nothing(
    loadtest: dict[str, Any], layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = loadtest["contenders"]
    cache = contenders.pack(layer, "triton")
    policies = [Static(sink=16, local=16), DENSE] * 2
    own = contenders.ours_of(layer, policies, cache, "triton")

    def unwanted(*_: Any) -> Any:
        raise AssertionError("a wait, or a plan")

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu"):
            patch.setattr(torch.Tensor, name, unwanted)
        patch.setattr(work, "plan_work", unwanted)
        out = own().clone()
    want = contenders.Ours(layer, policies, cache, "triton")
    assert torch.equal(out, want())
    own.account()
    (stats,), (other,) = own.stats, want.stats
    assert (stats.tiles_computed, stats.tiles_causal) == (other.tiles_computed, other.tiles_causal)
    assert stats.select_seconds > 0 < stats.attend_seconds
    assert stats.tiles_computed == own.tiles().computed


def test_a_gpus_layers_have_all_their_heads_and_follow_one_another(
    loadtest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, measure = loadtest["kernels"], loadtest["measure"]
    inputs, contenders = loadtest["inputs"], loadtest["contenders"]
    host = loadtest["machines"].machine("triton", 1, None)
    gpu = replace(host, calls=3, whole=True, baselines={"BASE": contenders.sdpa})
    llama = inputs.SHAPES["llama"]
    assert kernels.heads_measured(llama, 65536, gpu) == llama
    assert kernels.heads_measured(llama, 65536, host).heads == 4

    runs: list[str] = []
    planned, base = contenders.Planned.__call__, contenders.sdpa

    def counted(self: Any) -> torch.Tensor:
        runs.append("ours")
        return planned(self)

    def counted_base(layer: Any) -> Any:
        run = base(layer)

        def both() -> torch.Tensor:
            runs.append("base")
            return run()

        return both

    monkeypatch.setattr(contenders.Planned, "__call__", counted)
    gpu.baselines["BASE"] = counted_base
    layers = [inputs.random_layer(inputs.Shape(2, 1, 64), 70, torch.bfloat16, 0)]
    about = {"shape": "s", "input": "random", "length": 70, "heads": 2, "kv_heads": 1}
    case = measure.measure(
        layers, inputs.plan_steps(70, 0, 0), {"dense": [[DENSE] * 2]}, gpu, repeats=2,
        with_sdpa=False, budget=0.03, case=about | {"head_dim": 64, "heads_of_model": 2},
    )  # fmt: skip
    assert runs == ["ours"] * 3 + ["base"] * 3 + ["ours"] * 3 + ["base"] * 3 + ["ours"]
    ours, other = case.results
    assert ours.ratio == {"BASE": other.seconds / ours.seconds}
    assert 0 < ours.attend_seconds <= 3 * ours.seconds  # of one call


def _arguments(file: Path, name: str) -> tuple[set[str], set[str]]:
    """Those that a function wants, and all that it takes; by its source, since importing
    FlashAttention wants its compiled part."""
    body = ast.parse(file.read_text()).body
    (its,) = (one.args for one in body if isinstance(one, ast.FunctionDef) and one.name == name)
    names = [arg.arg for arg in its.args]
    needed = set(names[: len(names) - len(its.defaults)])
    return needed, {*names, *(arg.arg for arg in its.kwonlyargs)}


def test_the_other_attentions_are_called_as_vllm_calls_them(
    loadtest: dict[str, Any], layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders, machines = loadtest["contenders"], loadtest["machines"]
    for there, name in ((True, "FLASH_ATTN"), (False, "TRITON_ATTN")):
        monkeypatch.setattr(cuda_flash, "available", lambda there=there: there)
        assert list(machines.gpu_baselines()) == [name]

    # Neither has kernels here, but arguments.
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.ops import triton_unified_attention

    given: dict[str, dict[str, Any]] = {}

    def bound(file: str, name: str) -> Any:
        needed, known = _arguments(Path(vllm.__file__).parent / file, name)

        def call(**its: Any) -> str:
            assert needed <= its.keys() <= known
            given[name] = its
            return "a schedule"

        return call

    file = "vllm_flash_attn/flash_attn_interface.py"
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
        monkeypatch.setattr(fa_utils, name, bound(file, name), raising=False)
    for version, schedule in ((2, None), (3, "a schedule")):
        monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda *_, v=version, **__: v)
        contenders.flash_attn(layer)()
        call = given["flash_attn_varlen_func"]
        assert (call["scheduler_metadata"], call["fa_version"]) == (schedule, version)
    assert given["get_scheduler_metadata"]["page_size"] == 16
    name, file = "unified_attention", "v1/attention/ops/triton_unified_attention.py"
    monkeypatch.setattr(triton_unified_attention, name, bound(file, name))
    contenders.triton_attn(layer)()
    for call in given["flash_attn_varlen_func"], given[name]:
        assert call["k"].shape == (10, 16, 2, 64)
        assert torch.equal(call["k"].flatten(0, 1)[:150], layer.k)
        assert torch.equal(call["v"].flatten(0, 1)[:150], layer.v)
        assert (call["max_seqlen_q"], call["max_seqlen_k"], call["causal"]) == (70, 150, True)
        assert (call["cu_seqlens_q"].tolist(), call["seqused_k"].tolist()) == ([0, 70], [150])
