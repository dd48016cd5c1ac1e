"""loadtest/kernels.py with the Triton kernels: that it runs, since its times mean nothing here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "loadtest"))
    kernels = importlib.import_module("kernels")
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
    assert dense["ratio"].keys() == {"SDPA"} and sdpa["name"] == "SDPA"
