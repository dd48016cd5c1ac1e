"""Dense readings of an earlier evaluation: what is timed counts where it would be timed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.evaluate import kept
from vllm_sparse_backend.evaluate.kept import DenseReadings
from vllm_sparse_backend.evaluate.readings import Reading
from vllm_sparse_backend.offline import EngineOptions, refuse_lone_row
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.tasks.items import Item, Question

OPTIONS = EngineOptions("model", 1024)
ASKED = Item((1, 2, 3, 4), (Question("door code", (7,), "12345", 0.1),))
SCORED = Item(tuple(range(200)), scored=100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a reading of either kind."""
    readings = DenseReadings(tmp_path, OPTIONS)
    readings.save("needles-0", ASKED, Reading(answers=("a",), ttft=1.5))
    readings.save("text-0", SCORED, Reading(losses=(1.0,) * 100))
    return tmp_path


def _found(folder: Path) -> tuple[bool, bool]:
    readings = DenseReadings(folder, OPTIONS)
    loaded = readings.load("needles-0", ASKED), readings.load("text-0", SCORED)
    return loaded[0] is not None, loaded[1] is not None


def test_times_are_of_as_many_threads(folder: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert _found(folder) == (False, True)
    finally:
        torch.set_num_threads(threads)
    assert _found(folder) == (True, True)


def test_times_are_of_the_same_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = this_machine().model_copy(update={"cores": 64})
    monkeypatch.setattr(kept, "this_machine", lambda: other)
    assert _found(folder) == (False, True)


def test_a_gpu_is_another_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is read as in how long it takes; without one all is as before there was a field."""
    assert this_machine().gpu is None and "gpu" not in OPTIONS.identity()
    assert "gpu" not in DenseReadings(folder, OPTIONS)._machine
    monkeypatch.setattr("vllm_sparse_backend.offline.gpu", lambda: "NVIDIA H100 80GB HBM3")
    assert _found(folder) == (False, False)


def test_a_lone_row_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_lone_row(4097, 2048)
    monkeypatch.setattr("vllm_sparse_backend.offline.gpu", lambda: "NVIDIA H100 80GB HBM3")
    refuse_lone_row(4098, 2048)
    with pytest.raises(Refused, match="4097 tokens in steps of 2048: want no last step of one"):
        refuse_lone_row(4097, 2048)
