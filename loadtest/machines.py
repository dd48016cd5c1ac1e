"""What the benchmark runs on: the device of an implementation, its dense baseline, its peak."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from contenders import Run, cpu_attn, flash_attn, triton_attn
from inputs import Layer

from vllm_sparse_backend.ops.cpu import core

LAYERS = 8  # of a step on a GPU, timed together


def _at_once() -> None:
    """For calls that are done when they return."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One implementation's device."""

    impl: str  # of the op
    name: str  # an instruction set, or an architecture
    features: list[str]
    threads: int  # of the host, that compute
    peak_gops: dict[str, float]  # 1e9 operations a second, by dtype; of one thread, or of the GPU
    baselines: dict[str, Callable[[Layer], Run]]  # vLLM's own attention
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wait: Callable[[], None] = _at_once  # until what was launched is done
    # Calls that are timed together: the layers of a server's step are launched one after the other,
    # and none is waited for.
    calls: int = 1
    whole: bool = False  # layers are measured as they are, with all heads, however long the prompt


def machine(impl: str, threads: int, isa: str | None) -> Machine:
    """What ``impl`` ("cpu" or "triton") runs on here. Raises RuntimeError where it cannot."""
    if impl == "cpu":
        return _cpu(threads, isa)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _interpreter()
    return _gpu()


def _cpu(threads: int, isa: str | None) -> Machine:
    torch.set_num_threads(threads or torch.get_num_threads())
    core.set_isa(isa)
    return Machine(
        impl="cpu",
        name=core.active_isa(),
        features=_cpu_features(),
        threads=torch.get_num_threads(),
        peak_gops=core.peak(),
        baselines={"CPU_ATTN": cpu_attn},
    )


def _gpu() -> Machine:
    if not torch.cuda.is_available():
        raise RuntimeError("impl 'triton': want a GPU that torch can use, got none")
    from vllm_sparse_backend.ops.triton.launch import architecture

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        impl="triton",
        name=architecture(),
        features=[properties.name, f"{properties.multi_processor_count} multiprocessors"],
        threads=1,
        peak_gops=_gpu_peaks(device),
        baselines=gpu_baselines(),
        device=device,
        wait=torch.cuda.synchronize,
        calls=LAYERS,
        whole=True,
    )


def gpu_baselines() -> dict[str, Callable[[Layer], Run]]:
    """What the backend stands before on this GPU: FLASH_ATTN, or where vLLM finds none to run, as
    on ROCm, TRITON_ATTN."""
    from vllm_sparse_backend.backend.cuda_flash import available

    return {"FLASH_ATTN": flash_attn} if available() else {"TRITON_ATTN": triton_attn}


def _interpreter() -> Machine:
    """That the benchmark runs: none of its times means anything."""
    return Machine(
        impl="triton",
        name="interpreter",
        features=[],
        threads=1,
        peak_gops={"float32": 1.0},
        baselines={},
    )


def _gpu_peaks(device: torch.device) -> dict[str, float]:
    """What torch's own matrix products reach."""
    size = 8192
    peaks = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(size, size, device=device).to(dtype)
        seconds = _seconds(partial(torch.matmul, x, x))
        peaks[str(dtype).removeprefix("torch.")] = 2e-9 * size**3 / seconds
    codes = torch.randint(-127, 128, (size, size), device=device).to(torch.int8)
    peaks["int8"] = 2e-9 * size**3 / _seconds(partial(torch._int_mm, codes, codes.T))
    return peaks


def _seconds(call: Callable[[], object], times: int = 10) -> float:
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def _cpu_features() -> list[str]:
    """The CPU's instruction sets that decide how fast attention can be."""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    flags = Path("/proc/cpuinfo").read_text().split()
    return [name for name in known if name in flags]
