"""The Triton kernels: what is tested of them without a GPU, and that they are asked for by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _attention import make_paged, make_qkv, needs_core, run

from vllm_sparse_backend.ops import sparse_attention
from vllm_sparse_backend.ops.triton import plan_works

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


@pytest.mark.parametrize("most_keys", [1, 300, 800, 10**6])
def test_a_step_is_cut_where_its_contexts_would_take_too_much_memory(most_keys: int) -> None:
    contexts = np.array([500, 100, 200, 900, 64])
    works = plan_works(np.arange(6) * 64, contexts, [0, 1, 3, 4], "cpu", most_keys)
    lengths = [context for work in works for _, context in work.lengths]
    assert lengths == [500, 100, 900, 64]
    for work in works:
        assert len(work.lengths) == 1 or sum(n for _, n in work.lengths) <= most_keys
    assert len(works) == {1: 4, 300: 4, 800: 3, 10**6: 1}[most_keys]
