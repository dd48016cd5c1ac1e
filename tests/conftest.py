"""What several test files use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _models import make_llama

from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.ops.cpu.build import instruction_sets

# Interpreted kernels are tested in processes of their own; see interpreted/conftest.py.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") else ["interpreted"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: a real model, converted once per machine."""
    return ensure_model()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with random weights that starts in seconds; prompts are token ids."""
    return make_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(params=[isa.name for isa in instruction_sets()])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces each instruction set that this machine has."""
    if not core.isas()[request.param]:
        pytest.skip(f"this machine cannot run {request.param}; see test_ops_emulated.py")
    core.set_isa(request.param)
    yield request.param
    assert core.active_isa() == request.param
    core.set_isa(None)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file and return its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def pytest_unconfigure() -> None:
    # vLLM logs to what was stdout when it was imported: pytest's capture, closed by now.
    logging.raiseExceptions = False
