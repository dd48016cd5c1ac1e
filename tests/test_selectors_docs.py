"""docs/selectors.md, done as it says: its package, its profile, its commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from _attention import needs_core
from _engine import Scenario, environment, generate
from _models import token_ids
from _selectors import install

from vllm_sparse_backend.selection import registry

pytestmark = needs_core

PAGE = (Path(__file__).parents[1] / "docs" / "selectors.md").read_text()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, and what pip would add of them."""
    folder = tmp_path_factory.mktemp("package")
    files = re.findall(r"^`([a-z.]+)`\n\n```[a-z]+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["observed.py", "pyproject.toml", "profile.json"]
    for name, text in files:
        (folder / name).write_text(text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    install(folder, project["name"], project["entry-points"][registry.GROUP])
    return folder


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(PYTHONPATH=str(folder)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_as_short_as_a_method_should_be(package: Path) -> None:
    assert len((package / "observed.py").read_text().splitlines()) < 50


def test_the_ops_take_it_as_it_is(package: Path) -> None:
    (script,) = re.findall(r"^```python\n(import torch\n.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    density, error = python(package, "-c", script).strip().rsplit(maxsplit=1)
    assert all(0 < share < 1 for share in json.loads(density))
    assert float(error) > 0


def test_the_commands_know_it(package: Path) -> None:
    command = "from vllm_sparse_backend.cli import app; app()"
    assert "valid: profile" in python(package, "-c", command, "validate", "profile.json")
    shown = python(package, "-c", command, "inspect", "profile.json", "-o", "heads.svg")
    assert "l observed, tau 0.02, sink 16, local 128: 4 heads" in shown
    assert "l strided, stride 4, tile 64: 1 head" in shown
    found = json.loads(python(package, "-c", command, "inspect", "profile.json", "--json"))
    assert {kind["policy"]["selector"] for kind in found["kinds"]} == {
        "sale",
        "observed",
        "strided",
    }
    assert (package / "heads.svg").read_text().count("observed") >= 2
    listing = "from vllm_sparse_backend.doctor import _selectors; print(_selectors())"
    assert "'observed': 'observed:Observed'" in python(package, "-c", listing)


def test_a_server_follows_its_profile(package: Path, tiny_llama: Path, tmp_path: Path) -> None:
    prompts = [token_ids(seed, length) for seed, length in enumerate((3000, 700))]
    config = {"profile": str(package / "profile.json"), "min_prompt_tokens": 512}
    engine = {"max_num_batched_tokens": 1000}
    (result,) = generate(
        [Scenario(str(tiny_llama), [prompts], config=config, engine=engine)],
        tmp_path,
        PYTHONPATH=str(package),
    )
    assert [len(answer.tokens) for answer in result.answers[0]] == [16, 16]
    assert result.layer_tokens["sparse"] > 2 * 3000
    assert 0 < result.tiles["computed"] < 0.95 * result.tiles["causal"]
