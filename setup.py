"""Builds the CPU core beside the package's own metadata (which is in pyproject.toml).

Without a C++ compiler, as on a GPU-only install, the package installs without the core and
the CPU backend says so when it is asked for. VLLM_SPARSE_PREFILL_BUILD=require makes a
missing compiler an error, =skip leaves the core out.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD_FILE = Path(__file__).parent / "vllm_sparse_backend/ops/cpu/build.py"
spec = importlib.util.spec_from_file_location("core_build", BUILD_FILE)
assert spec is not None and spec.loader is not None
core_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core_build)


class BuildCore(build_ext):
    """Hands the one extension, which is no Python module, to build.py."""

    def build_extension(self, ext: Extension) -> None:
        core_build.build(Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python ABI in it, so none in its name


def wants_core() -> bool:
    choice = os.environ.get("VLLM_SPARSE_PREFILL_BUILD", "auto")
    if choice not in ("auto", "require", "skip"):
        sys.exit(f"VLLM_SPARSE_PREFILL_BUILD: want auto, require or skip, got {choice!r}")
    if choice == "skip":
        return False
    lacking = (
        "no C++ compiler"
        if core_build.find_compiler() is None
        else f"no x86-64 machine but {platform.machine()}"
        if platform.machine() not in ("x86_64", "AMD64")
        else None
    )
    if lacking and choice == "require":
        sys.exit(f"the CPU core cannot be built here: {lacking}")
    if lacking:
        print(f"warning: installing without the CPU core: {lacking}", file=sys.stderr)
    return lacking is None


core = Extension("vllm_sparse_backend.ops.cpu._core", sources=[])
setup(ext_modules=[core] if wants_core() else [], cmdclass={"build_ext": BuildCore})
