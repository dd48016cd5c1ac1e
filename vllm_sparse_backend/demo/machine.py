"""What something ran on: CPU features rather than a product name, the GPU, and the versions of the
parts.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

TOPOLOGY = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
# Those an attention kernel can tell apart, as /proc/cpuinfo spells them.
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)
PACKAGES = ("vllm-sparse-backend", "vllm", "torch", "transformers")


ASK = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
FAST_BFLOAT16 = "avx512f"  # without it oneDNN multiplies bf16 matrices ten times slower than fp32


class Machine(BaseModel):
    """CPU, threads and versions, as the report shows them."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    features: tuple[str, ...]
    cores: int
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]
    gpu: str | None = None  # its name, where vLLM runs on one

    def describe(self) -> str:
        """One line: "x86_64 with avx2, fma; 2 cores; 23 GiB"."""
        features = ", ".join(self.features) or "no vector features known here"
        gpu = f"{self.gpu}; " if self.gpu else ""
        cores = f"{self.cores} cores; {self.memory_gib:.0f} GiB"
        return f"{gpu}{self.architecture} with {features}; {cores}"


def this_machine() -> Machine:
    """The machine this process runs on."""
    return Machine(
        architecture=platform.machine(),
        features=tuple(_features()),
        cores=usable_cores(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        system=platform.system(),
        python=platform.python_version(),
        versions=dict(_versions(PACKAGES)),
        gpu=gpu(),
    )


def fast_dtype() -> str:
    """The dtype to serve a model in here: bfloat16 on a GPU, or where the CPU multiplies it, else
    float32."""
    if gpu() is not None:
        return "bfloat16"
    flags = _flags()
    return "bfloat16" if not flags or FAST_BFLOAT16 in flags else "float32"


@cache
def gpu() -> str | None:
    """The name of the GPU that vLLM would run on; None: torch is built for CPUs, or finds none.

    Without vLLM, which takes settings from the environment when it is imported.
    """
    try:
        if version("torch").endswith("+cpu"):  # known without importing it, which takes seconds
            return None
    except PackageNotFoundError:
        return None
    # In another process: asking makes a context, which would hold memory that a server is to have.
    found = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def usable_cores() -> int:
    """Physical cores this process may use: its affinity mask without SMT siblings, within the
    cgroup's CPU quota if there is one."""
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota(Path("/sys/fs/cgroup/cpu.max"))))


def _siblings(cpu: int) -> str:
    try:
        return (TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:  # some containers hide it
        return str(cpu)


def _quota(cpu_max: Path) -> int:
    try:
        quota, period = cpu_max.read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return os.cpu_count() or 1


def _features() -> Iterable[str]:
    flags = _flags()
    return (name for name in FEATURES if name in flags)


def _flags() -> list[str]:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return []
    return next((line for line in lines if line.startswith("flags")), "").split()


def _versions(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in packages:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
