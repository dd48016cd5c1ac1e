"""Scratch memory: bounded at any length, nothing quadratic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _attention import needs_core

from vllm_sparse_backend.ops import layout, paged_sparse_attention

LENGTH = 1 << 17
PEAK = Path("/proc/self/clear_refs")  # writing 5 starts VmHWM anew


def _megabytes(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


@needs_core
@pytest.mark.parametrize("selector", ["dense", "sale", "mass"])
def test_scratch_at_128k(selector: str) -> None:
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, LENGTH, 2, 128, generator=g, dtype=torch.bfloat16)
    q = torch.randn(128, 8, 128, generator=g, dtype=torch.bfloat16)
    cache = layout.pack(k, v)
    pages = torch.arange(len(cache), dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, 128]).int(), torch.tensor([LENGTH]).int()
    out = torch.empty_like(q)
    try:
        PEAK.write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel does not start VmHWM anew: {error}")
    before = _megabytes("VmRSS")
    paged_sparse_attention(q, cache, pages, starts, lengths, {"selector": selector}, out=out)
    grown = _megabytes("VmHWM") - before
    assert out.isfinite().all()
    assert grown <= 32 * torch.get_num_threads()
