"""The build of the core: one list of instruction sets, and what is said without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from _attention import needs_core

from vllm_sparse_backend.ops.cpu import build, core

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_sparse_backend/ops/cpu"
# What an instruction set is chosen for: found in code compiled for it, in no lesser one's.
TELLTALE = {
    "avx512_bf16": ("vdpbf16ps",),
    "avx512_vnni": ("vpdpbusd",),
    "avx512": ("%zmm",),
    "avx2": ("%ymm",),
}


def setup(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads, without what was built before."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "vllm_sparse_backend",
        copy / "vllm_sparse_backend",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_one_list_drives_compiling_and_detecting() -> None:
    listed = [isa.name for isa in build.instruction_sets()]
    lines = (build.CSRC / "isa.def").read_text().count("VSB_ISA(") - 1  # one is in the comment
    assert len(listed) == lines == len(set(listed))
    assert set(listed) == set(TELLTALE)
    for better, worse in zip(build.instruction_sets(), build.instruction_sets()[1:], strict=False):
        assert set(worse.features) < set(better.features), "best first"


@needs_core
def test_what_can_run_here_is_what_the_cpu_says() -> None:
    assert list(core.isas()) == [isa.name for isa in build.instruction_sets()]
    found = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert found is not None
    flags = {flag.replace("_", "") for flag in found[1].split()}
    for isa in build.instruction_sets():
        assert core.isas()[isa.name] is (set(isa.features) <= flags)


@needs_core
def test_each_path_is_compiled_from_its_own_instructions() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(build.LIBRARY)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    code: dict[str, list[str]] = {name: [] for name in TELLTALE}
    for function in re.split(r"\n\n(?=[0-9a-f]+ <)", text):
        owner = re.match(r"[0-9a-f]+ <(?:.*? )?(?:void |int )?.*?vsb::(\w+)::", function)
        if owner and owner[1] in code:
            code[owner[1]].append(function)
    names = list(TELLTALE)
    for i, name in enumerate(names):
        everything = "\n".join(code[name])
        assert all(word in everything for word in TELLTALE[name]), name
        for better in names[:i]:
            assert not any(word in everything for word in TELLTALE[better]), f"{better} in {name}"


@needs_core
def test_an_instruction_set_is_forced_by_name_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = list(core.isas())
    with pytest.raises(ValueError, match=re.escape(f"cpu_isa: want one of {names}, got 'sse9'")):
        core.set_isa("sse9")
    best = core.active_isa()
    assert best == next(name for name, usable in core.isas().items() if usable)
    core.set_isa("avx2")
    assert core.active_isa() == "avx2"
    # A refused name changes nothing.
    with pytest.raises(ValueError, match="cpu_isa"):
        core.set_isa("AVX2")
    assert core.active_isa() == "avx2"
    core.set_isa(None)
    assert core.active_isa() == best
    monkeypatch.setattr(core, "isas", lambda: dict.fromkeys(names, False))
    with pytest.raises(ValueError, match="'avx2' cannot run on this machine"):
        core.set_isa("avx2")
    with pytest.raises(core.CoreUnavailable, match="needs an x86-64 with AVX2, FMA and F16C"):
        core.active_isa()


@pytest.mark.usefixtures("no_compiler")
def test_building_without_a_compiler(tmp_path: Path) -> None:
    assert build.find_compiler() is None
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found: want g\+\+ >= 11"):
        build.build(tmp_path / "core.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    library = tmp_path / "core.so"
    library.write_text("old")
    with pytest.raises(subprocess.CalledProcessError):
        build.build(library, compiler="/bin/false")
    assert library.read_text() == "old"
    assert list(tmp_path.iterdir()) == [library]


def test_installing_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    command = ("build_ext", "--inplace")
    nothing = {"PATH": str(tmp_path), "CXX": ""}
    done = setup(*command, cwd=checkout, **nothing)
    assert done.returncode == 0, done.stderr
    assert "warning: installing without the CPU core: no C++ compiler" in done.stderr
    done = setup(*command, cwd=checkout, VLLM_SPARSE_PREFILL_BUILD="require", **nothing)
    assert done.returncode != 0
    assert done.stderr.strip() == "the CPU core cannot be built here: no C++ compiler"
    done = setup(*command, cwd=checkout, VLLM_SPARSE_PREFILL_BUILD="skip")
    assert done.returncode == 0, done.stderr
    done = setup(*command, cwd=checkout, VLLM_SPARSE_PREFILL_BUILD="maybe")
    assert done.returncode != 0
    assert "want auto, require or skip, got 'maybe'" in done.stderr
    assert not list(checkout.rglob("*.so"))


@pytest.mark.all
@needs_core
def test_the_sources_compile_without_warnings(tmp_path: Path) -> None:
    library = tmp_path / "core.so"
    build.build(library, extra_flags=("-Werror",))
    done = subprocess.run(["ldd", library], check=True, capture_output=True, text=True).stdout
    assert "libgomp.so.1" in done
    assert not any(word in done for word in ("torch", "libpython", "not found"))


@pytest.mark.all
@needs_core
def test_the_wheel_has_the_core_and_its_sources_have_what_builds_it(
    checkout: Path, tmp_path: Path
) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", str(tmp_path), str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"{PACKAGE}/_core.so" in names
    assert f"{PACKAGE}/core.py" in names
    assert "linux" in wheel.name, "a wheel with compiled code is not for any machine"
