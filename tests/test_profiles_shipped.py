"""The profiles that come with the package: valid, of the models they are for, and with figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _engine import environment
from jsonschema import Draft202012Validator

from vllm_sparse_backend.profile import load_profile
from vllm_sparse_backend.profiles import FOLDER, SCHEMA, shipped_for
from vllm_sparse_backend.selection import DENSE

SHIPPED = sorted(path for path in FOLDER.glob("*.json") if path != SCHEMA)


def test_there_are_some() -> None:
    assert [path.stem for path in SHIPPED] == ["gemma-3-270m", "smollm2-135m-instruct"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_is_as_the_schema_has_it_and_says_what_it_costs(path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(path.read_text()))
    profile = load_profile(path)
    assert shipped_for(profile.model.digest) == profile
    assert profile.defaults == DENSE, "what was not measured is not approximated"
    calibration = profile.calibration
    assert calibration is not None and calibration.seed is not None
    assert not any("/" in text for text in calibration.texts), "names, and nobody's paths"
    for length in calibration.lengths:
        for name in ("density", "error", "tail", "recall"):
            assert 0 <= calibration.figures[f"{name}_{length}"] <= 1
    evaluated = [name for name in calibration.figures if name.startswith("eval_")]
    assert evaluated, "what it loses end to end"


def test_the_first_model_finds_its_profile(smollm2: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm-sparse")), "doctor", "--model", str(smollm2)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert "profile SmolLM2-135M-Instruct (sha256:" in done.stdout, done.stdout + done.stderr
    assert "shipped" in done.stdout
    assert "warning" not in done.stdout
