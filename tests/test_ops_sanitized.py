"""The core under the address and undefined-behaviour sanitizers, every instruction set's path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _attention import needs_core

from vllm_sparse_backend.ops.cpu import build, core

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
# Compiles in a quarter of the time. A null pointer is found without a check for it.
QUICK = ("-O0", "-fno-sanitize=null,pointer-overflow")
SCENARIO = Path(__file__).with_name("_sanitized.py")

pytestmark = needs_core


def runtimes() -> list[str]:
    """What has to be in a process before Python is. Skips where the compiler has none of it."""
    compiler = build.find_compiler()
    assert compiler is not None
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():  # a name that it does not know comes back as it is
            pytest.skip(f"{compiler} comes without {name}")
        found.append(path)
    return found


def build_and_run(
    tmp_path: Path, scenario: str, flags: tuple[str, ...], emulated: bool = False
) -> subprocess.CompletedProcess[str]:
    preload = ":".join(runtimes())
    library = tmp_path / "sanitized.so"
    if not library.exists():
        build.build(library, emulated=emulated, extra_flags=(*FLAGS, *flags))
    options = {
        "detect_leaks": 0,  # of Python there are many
        # Fresh memory is all NaN: what is read before it is written shows in the results.
        "max_malloc_fill_size": 1 << 30,
        "malloc_fill_byte": 255,
    }
    return subprocess.run(
        [sys.executable, str(SCENARIO), str(library), scenario],
        env=os.environ
        | {
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True,
        text=True,
        check=False,  # the caller does, and says what there was on stderr
    )


def assert_ran(process: subprocess.CompletedProcess[str], emulated: bool = False) -> None:
    assert process.returncode == 0, process.stderr[-4000:]
    wanted = [name for name, usable in core.isas().items() if usable or emulated]
    assert process.stdout.split() == wanted


def test_the_paths_of_this_machine(tmp_path: Path) -> None:
    """A small part of it; and that errors are found."""
    assert_ran(build_and_run(tmp_path, "small", QUICK))
    overrun = build_and_run(tmp_path, "overrun", QUICK)
    assert overrun.returncode != 0
    assert "heap-buffer-overflow" in overrun.stderr
    assert not overrun.stdout


@pytest.mark.all
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("emulated", [False, True], ids=["native", "emulated"])
def test_every_path_and_shape(tmp_path: Path, emulated: bool) -> None:
    assert_ran(build_and_run(tmp_path, "full", ("-O1",), emulated), emulated)
