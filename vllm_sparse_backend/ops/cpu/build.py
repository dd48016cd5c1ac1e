"""Compiles the CPU core. Standard library only: setup.py runs it before anything is installed.

One object per line of ``csrc/isa.def``, each with its own instruction-set flags, linked with
the driver into a shared library with a plain C interface (no Python, no torch ABI).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_core.so"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# Width of the vectors differs between the objects, and none crosses between them.
FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes"]
# GCC 12 warns of its own headers (_mm512_undefined_ps, std::string).
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-restrict"]


class Isa(NamedTuple):
    name: str
    lanes: int
    bf16_dot: int
    int8_dot: int
    features: tuple[str, ...]


def instruction_sets() -> list[Isa]:
    """The lines of isa.def, best first."""
    line = re.compile(r"^VSB_ISA\((\w+), (\d+), ([01]), ([01]), (.*)\)$", re.MULTILINE)
    return [
        Isa(name, int(lanes), int(bf16), int(int8), tuple(re.findall(r"F\((\w+)\)", features)))
        for name, lanes, bf16, int8, features in line.findall((CSRC / "isa.def").read_text())
    ]


def find_compiler() -> str | None:
    """``$CXX``, else g++, else c++: the kernels use GCC's vector extension."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def build(
    library: Path = LIBRARY,
    *,
    compiler: str | None = None,
    emulated: bool = False,
    extra_flags: tuple[str, ...] = (),
) -> None:
    """Compile and link the core into ``library``.

    ``emulated`` compiles every path for AVX2, with plain loops where an instruction is
    missing: slow, and for tests of the AVX-512 paths on machines that lack them.

    Raises ``RuntimeError`` without a compiler and ``subprocess.CalledProcessError`` with the
    compiler's messages on stderr if it fails.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found: want g++ >= 11 (or name one in $CXX)")
    flags = [*FLAGS, *extra_flags, *(["-DVSB_EMULATED"] if emulated else [])]
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for isa in instruction_sets():
            features = ("avx2", "fma", "f16c") if emulated else isa.features
            defines = (
                f"-DVSB_ISA_NAME={isa.name}",
                f"-DVSB_LANES={isa.lanes}",
                f"-DVSB_BF16_DOT={isa.bf16_dot}",
                f"-DVSB_INT8_DOT={isa.int8_dot}",
            )
            jobs.append(("kernel.cpp", isa.name, [*defines, *(f"-m{f}" for f in features)]))
        jobs.append(("core.cpp", "core", ["-fopenmp"]))

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, name, own = job
            object_file = f"{scratch}/{name}.o"
            subprocess.run(
                [compiler, *flags, *own, "-c", str(CSRC / source), "-o", object_file], check=True
            )
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        linked = f"{scratch}/{library.name}"
        link = [compiler, "-shared", "-fopenmp", *extra_flags, *objects, "-o", linked]
        subprocess.run(link, check=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(linked, f"{library}.new")  # across file systems this is a copy
        os.replace(f"{library}.new", library)  # a process that has the old one mapped keeps it


if __name__ == "__main__":
    build()
