"""A driver for devices that are not there: the launch code runs, kernels are compiled, none runs.

Each architecture is a device of its own number, so that what Triton keeps per device, the compiled
kernels and the limit of shared memory, is never taken for another's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES

# Bytes of shared memory that one block may have: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; AMD's CDNA 3 and CDNA 4 instruction set references.
SHARED: Final = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10,
    "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip


def target_of(arch: str) -> GPUTarget:
    """Triton's name for an architecture of the launch table."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Launched:
    """One launch, as a driver sees it."""

    kernel: str
    grid: tuple[int, int, int]
    signature: dict[str, str]
    attributes: dict[str, list[Any]]  # by argument: what it was specialized on
    metadata: Any  # Triton's: num_warps, num_stages, shared, target


@dataclass
class StubDriver:
    """What Triton asks of a driver; launches are kept instead of run."""

    arch: str
    shared: int  # bytes that a block may have; a kernel with more raises OutOfResources
    launches: list[Launched] = field(default_factory=list)

    def get_current_target(self) -> GPUTarget:
        """The architecture that kernels are compiled for."""
        return target_of(self.arch)

    def get_current_device(self) -> int:
        """A number for each architecture and limit."""
        return hash((self.arch, self.shared))

    def get_current_stream(self, device: int) -> int:
        """There is but one."""
        return 0

    @property
    def utils(self) -> StubDriver:
        """The driver's other half, in the real ones a compiled module."""
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of all properties the one that a launch is held to."""
        return {"max_shared_mem": self.shared}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills and the most threads."""
        return name, name, 0, 0, 1024

    def unload_module(self, module: str) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches one compiled kernel from then on."""
        names = list(source.signature)
        attributes = {names[at[0]]: value for at, value in source.attrs.items() if value}

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            signature = dict(source.signature)
            grid = (x, y, z)
            self.launches.append(Launched(source.name, grid, signature, attributes, metadata))

        return launch


@contextmanager
def stub_driver(arch: str, shared: int | None = None) -> Iterator[StubDriver]:
    """Triton's driver is a stub for ``arch``; ``shared`` bytes a block instead of its own limit."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture: want one of {list(ARCHITECTURES)}, got {arch!r}")
    before = driver._active  # `driver.active` would look for a real one
    stub = StubDriver(arch, SHARED[arch] if shared is None else shared)
    driver.set_active(stub)
    try:
        yield stub
    finally:
        driver._active = before
