"""The soak: a minute of it against the tiny model, and what it makes of memory that grows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _engine import environment

FOLDER = Path(__file__).parents[1] / "loadtest"
MIB = 2**20


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    """The module that judges memory; loadtest/ is no package."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("soak_memory")
    sys.path.remove(str(FOLDER))


def samples(soak: Any, *mib: float) -> list[Any]:
    return [soak.Sample(float(i), 0, {"a 1": int(m * MIB), "b 2": MIB}) for i, m in enumerate(mib)]


def test_growth_is_of_the_last_fifth_over_the_first(soak: Any) -> None:
    whole, by_process = soak.growth(samples(soak, *[99] * 5, 50, 500, *[99] * 3, *[104] * 5))
    assert whole == pytest.approx(0.05)
    assert by_process == {"a 1": pytest.approx(5 / 99), "b 2": 0.0}


def test_one_outlier_is_no_growth(soak: Any) -> None:
    whole, _ = soak.growth(samples(soak, *[99] * 14, 300))
    assert whole == 0


def test_a_process_that_comes_counts(soak: Any) -> None:
    later = [soak.Sample(9.0, 0, {"a 1": 99 * MIB, "b 2": MIB, "c 3": 50 * MIB})] * 5
    whole, by_process = soak.growth([*samples(soak, *[99] * 5), *later])
    assert whole == pytest.approx(0.5)
    assert set(by_process) == {"a 1", "b 2"}


def test_memory_is_of_all_processes_of_a_session(soak: Any) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, start_new_session=True
    ) as parent:
        found: dict[str, int] = {}
        # One that is just being started has next to no memory: both interpreters are waited for.
        while len(found) < 2 or min(found.values()) < MIB:
            found = soak.memory(parent.pid)
        assert any(name.endswith(f" {parent.pid}") for name in found)
        assert all(resident < 500 * MIB for resident in found.values())
        assert f"{os.getpid()}" not in {name.rpartition(" ")[2] for name in found}
        assert parent.stdin is not None
        parent.stdin.close()
    assert soak.memory(parent.pid) == {}


def test_a_plot(soak: Any, tmp_path: Path) -> None:
    soak.plot(samples(soak, *range(90, 110)), 5.0, tmp_path / "soak.svg")
    assert "<svg" in (tmp_path / "soak.svg").read_text()


@needs_core
@pytest.mark.all
def test_a_minute_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, str(FOLDER / "soak.py"), "--minutes", "0.75", "--warm-up", "0.3"),
            *("--model", str(tiny_llama), "--random-tokens", "--max-model-len", "4096"),
            *("--min-prompt-tokens", "512", "--dtype", "float32", "--clients", "8"),
            *("--max-growth", "0.1", "--output", str(output)),  # so soon, nothing is settled
        ],
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    outcome = json.loads((output / "soak.json").read_text())
    assert outcome["problems"] == outcome["errors"] == []
    assert set(outcome["requests"]) == {"short", "long", "continued", "hung up on", "given up"}
    assert outcome["prompt_tokens"] > 16384
    assert outcome["counted"]["sparse_layer_tokens"] > 0
    assert len(outcome["samples"]) > 30
    assert len(outcome["samples"][0]["resident"]) >= 3  # API server, engine, worker
    assert "<svg" in (output / "soak.svg").read_text()
