"""The Triton kernels: what is tested of them without a GPU, and that they are asked for by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _attention import make_paged, make_qkv, needs_core, run

from vllm_sparse_backend.ops import sparse_attention

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted/test_*.py")))
def test_interpreted(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"interpreted/{file}", "-p", "no:cacheprovider"],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_kernel_runs_on_the_host_unless_it_is_interpreted() -> None:
    with pytest.raises(
        ValueError, match="q: want a tensor on a GPU for impl 'triton', got one on cpu"
    ):
        sparse_attention(*make_qkv(0, 4, 4), impl="triton")


@needs_core
def test_each_implementation_has_its_own_layouts() -> None:
    paged = make_paged([make_qkv(0, 4, 40)], "strided", 32)
    wanted = r"kv_layout: want one of \['vec', 'vec16', 'amx'\] for impl 'cpu', got 'strided'"
    with pytest.raises(ValueError, match=wanted):
        run(paged, None, "cpu")
    assert run(paged, None, "reference")[0].isfinite().all()
