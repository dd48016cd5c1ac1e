"""loadtest/kernels.py: its inputs are what it says, and a bad result has no speed-up."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import needs_core
from typer.testing import CliRunner

FOLDER = Path(__file__).parents[1] / "loadtest"
NAMES = ("inputs", "generate", "truth", "contenders", "machines", "measure", "results", "kernels")

pytestmark = needs_core


@pytest.fixture(scope="module")
def loadtest() -> Iterator[dict[str, Any]]:
    """The scripts as modules; loadtest/ is no package."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def layer(loadtest: dict[str, Any]) -> Any:
    shape = loadtest["inputs"].Shape(4, 1, 128)
    return loadtest["generate"].generate(shape, 4096, torch.float32, seed=3)


def test_generated_input_is_repeatable(loadtest: dict[str, Any], layer: Any) -> None:
    def make(seed: int) -> Any:
        shape = loadtest["inputs"].Shape(4, 1, 128)
        return loadtest["generate"].generate(shape, 4096, torch.float32, seed)

    again = make(3)
    for name in ("q", "k", "v", "needles"):
        assert torch.equal(getattr(layer, name), getattr(again, name))
    assert not torch.equal(layer.q, make(4).q)


def test_needles_are_looked_at(loadtest: dict[str, Any], layer: Any) -> None:
    assert len(layer.needles) >= 100
    truth = loadtest["truth"].Truth(layer)
    for row, head, key in layer.needles[::20].tolist():
        weights = truth.weights(head, row, row + 1)[0]
        assert row - key >= 1024
        assert weights[key] > 0.25
        assert weights[key] > 100 * weights[key - 3]


def test_an_oracle_needs_few_tiles_and_a_window_does_not_do(
    loadtest: dict[str, Any], layer: Any
) -> None:
    truth = loadtest["truth"].Truth(layer)
    coarse, fine = truth.oracle_density(64), truth.oracle_density(16)
    assert 0.05 < fine < coarse < 0.45
    last = loadtest["inputs"].Step(2048, 4096, 1.0).of(layer)
    run = loadtest["contenders"].Ours(
        last, [importlib.import_module("vllm_sparse_backend.selection").Static(local=256)] * 4,
        loadtest["contenders"].pack(last, "cpu"), "cpu",
    )  # fmt: skip
    error = loadtest["truth"].Truth(last).judge(run(), run.tiles())
    assert error.relative_l1 > 0.3
    assert error.recall < 0.9
    assert error.needles < 0.2 * error.needles_of


def test_steps_of_a_whole_prompt(loadtest: dict[str, Any]) -> None:
    plan_steps = loadtest["inputs"].plan_steps
    whole = plan_steps(5000, 0, 8)
    assert [(s.start, s.end, s.weight) for s in whole.steps] == [
        (0, 2048, 1), (2048, 4096, 1), (4096, 5000, 1),
    ]  # fmt: skip
    sampled = plan_steps(65536, 0, 4)
    assert sum(s.weight * 2048 for s in sampled.steps) == 65536
    # Dense attention's work, which grows linearly with a row's position, comes out right.
    work = sum(s.weight * 2048 * (s.start + s.end) / 2 for s in sampled.steps)
    assert work == pytest.approx(65536**2 / 2, rel=0.01)
    assert [(s.start, s.end) for s in plan_steps(5000, 100, 0).steps] == [(4900, 5000)]


@pytest.mark.parametrize("kind", ["generated", "random"])
def test_the_command(loadtest: dict[str, Any], tmp_path: Path, kind: str) -> None:
    app = loadtest["kernels"].typer.Typer()
    app.command()(loadtest["kernels"].main)
    file = tmp_path / "report.json"
    result = CliRunner().invoke(
        app,
        [
            "--shape", "gemma", "--length", "512", "--length", "3072", "--input", kind,
            "--policy", '{"selector": "static", "local": 64}', "--policy", "mass",
            "--repeats", "1", "--json", str(file), "--plots", str(tmp_path / "plots"), "--strict",
        ],
    )  # fmt: skip
    assert result.exit_code == 1, result.output  # the window alone is refused
    report = loadtest["results"].Report.model_validate(json.loads(file.read_text()))
    assert report.refused
    for case in report.cases:
        dense, window, mass, base, sdpa = case.results
        assert (dense.name, base.name, sdpa.name) == ("dense", "CPU_ATTN", "SDPA")
        assert dense.ratio["CPU_ATTN"] == pytest.approx(base.seconds / dense.seconds)
        assert dense.error.relative_l1 < 0.01
        assert (window.refused or "").startswith("relative L1")
        assert window.ratio == {}
        assert 0 < window.density < mass.density <= 1
        assert mass.select_seconds > 0 or case.length == 512
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"speedup.png", "speedup.svg", "phases.png", "phases.svg"}


def test_captured_input_is_of_one_model(loadtest: dict[str, Any]) -> None:
    app = loadtest["kernels"].typer.Typer()
    app.command()(loadtest["kernels"].main)
    result = CliRunner().invoke(app, ["--shape", "llama", "--length", "64", "--input", "captured"])
    assert result.exit_code == 2
    assert "want the shape smollm2" in result.output


def test_gpu_kernels_want_a_gpu(loadtest: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    app = loadtest["kernels"].typer.Typer()
    app.command()(loadtest["kernels"].main)
    result = CliRunner().invoke(app, ["--impl", "triton", "--length", "64"])
    assert result.exit_code == 2
    assert "want a GPU that torch can use" in result.output


@pytest.mark.parametrize(("option", "value"), [("--isa", "avx2"), ("--threads", "2")])
def test_a_cpus_options_are_not_a_gpus(loadtest: dict[str, Any], option: str, value: str) -> None:
    app = loadtest["kernels"].typer.Typer()
    app.command()(loadtest["kernels"].main)
    result = CliRunner().invoke(app, ["--impl", "triton", option, value])
    assert result.exit_code == 2
    assert f"{option}: is of --impl cpu, got {value}" in result.output
