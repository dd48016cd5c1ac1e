"""The forms that Model Optimizer's calibrations have had, and which of them are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from test_import import FACTS, JSON, Write, calibrated

from vllm_sparse_backend.errors import ProfileError, SparsePrefillError
from vllm_sparse_backend.exchange import Imported, import_profile
from vllm_sparse_backend.selection import DENSE, Sale

OLD = {"sparse_algo": "softmax_skip", "targets": ["LlamaAttention"]}
PRODUCER = {"name": "modelopt", "version": "0.37.0"}


def section(group: dict[str, Any], **beside: Any) -> dict[str, Any]:
    """A config.json as it was written before 0.45."""
    return {
        "sparse_attention_config": {
            "config_groups": {"group_0": group}, **beside, "producer": PRODUCER
        }
    }  # fmt: skip


def take(write: Write, data: Any) -> Imported:
    """Import it from a file."""
    return import_profile(write("theirs.json", json.dumps(data)), FACTS)


@pytest.mark.parametrize(
    ("data", "tau", "slope", "said"),
    [
        # As exported by 0.43 and 0.44; the sparsity is 0.5 where none is said.
        (
            section(OLD, threshold_scale_factor={
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 0.5, "b": 8.61}, "decode": {"a": 0.12, "b": 9.85},
            }),
            0.5 * math.exp(8.61 / 2) / 8192, -1, "for a sparsity of 0.5",
        ),
        # As documented before, calibrated and not.
        (
            section(OLD, threshold_scale_factor=437.7, target_sparsity=0.3),
            437.7 / 8192, -1, "with a scale factor of 437.7 for a sparsity of 0.3",
        ),
        (section({**OLD, "threshold": 1e-4}), 1e-4, 0, "at any length"),
        (section({**OLD, "threshold": {"prefill": 1e-3, "decode": 1e-5}}), 1e-3, 0, "any length"),
        # As TensorRT-LLM takes it.
        (
            section({"algorithm": "skip_softmax", "threshold_scale_factor": 1000}),
            1000 / 8192, -1, "with a scale factor of 1000)",
        ),
        (
            {"sparse_attention_config": {
                "algorithm": "skip_softmax",
                "threshold_scale_factor": {"prefill": 1000.0, "decode": 20.0},
            }},
            1000 / 8192, -1, "with a scale factor of 1000)",
        ),
        (
            {"algorithm": "skip_softmax", "threshold_scale_factor": 1000.0},
            1000 / 8192, -1, "with a scale factor of 1000)",
        ),
    ],
)  # fmt: skip
def test_other_forms_of_a_threshold(
    write: Write, data: dict[str, Any], tau: float, slope: float, said: str
) -> None:
    made = take(write, data)
    policy = made.profile.defaults
    assert isinstance(policy, Sale) and not made.profile.policies
    assert policy.tau == pytest.approx(tau) and policy.tau_slope == slope
    assert said in made.notes[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (section({**OLD, "algorithm": "skip_softmax"}), "want algorithm or sparse_algo, got both"),
        (section({"sparse_algo": "vsa"}), "all layers and heads want vsa"),
        (section(OLD), "it was not calibrated"),
        (section(OLD, target_sparsity=0.3), "it was not calibrated"),
        (section({**OLD, "threshold_scale_factor": 3}, threshold_scale_factor=4), "got both"),
        (section({**OLD, "threshold": 1e-4}, threshold_scale_factor=4), "which one holds"),
        (section({**OLD, "threshold": 0}), r"threshold.prefill: .*greater than 0, got 0"),
        (section({**OLD, "threshold": [1e-4]}), "threshold"),
        (section({**OLD, "threshold": True}), "threshold"),
        (section(OLD, threshold_scale_factor=0), r"prefill.a: .*greater than 0, got 0"),
        (section(OLD, threshold_scale_factor=9e9), "a scale factor of 9e[+]09 gives a threshold"),
        (section(OLD, threshold_scale_factor={"decode": 3}), "prefill: missing"),
        (section(OLD, threshold_scale_factor={"prefill": {"log_a": -3, "b": 1}}), "log_a: unknown"),
        (section(OLD, threshold_scale_factor=3, layers={}), "sparse_attention_config.layers: not"),
        (section({**OLD, "disabled_layers": []}, threshold_scale_factor=3), "disabled_layers"),
    ],
)
def test_a_threshold_of_unsure_meaning_is_refused(
    write: Write, data: dict[str, Any], said: str
) -> None:
    with pytest.raises(ProfileError, match=f"theirs.json: .*{said}"):
        take(write, data)


@pytest.mark.parametrize(
    ("pattern", "dense", "note"),
    [
        ("*lm_head*", [], "of no attention, and without effect: *lm_head*"),
        ("lm_head", [], "of no attention, and without effect: lm_head"),
        ("model.layers.1.mlp", [], "of no attention, and without effect: model.layers.1.mlp"),
        ("*layers.1.*", [1], "dense as in the file: layers 1"),
        ("model.layers.[01].self_attn", [0, 1], "dense as in the file: layers 0, 1"),
        ("*attn*", [0, 1], "dense as in the file: layers 0, 1"),
        ("layers.?.self_attn", [0, 1], "dense as in the file: layers 0, 1"),
    ],
)
def test_patterns_of_modules_that_stay_dense(
    write: Write, pattern: str, dense: list[int], note: str
) -> None:
    made = take(write, calibrated(ignore=[pattern]))
    assert [n for n in range(2) if made.profile.for_layer(n) == [DENSE] * 4] == dense
    assert made.notes[1:] == (note,)


HOLES: list[Callable[[Any], Any]] = [
    lambda x: section({"sparse_algo": x}, threshold_scale_factor=3),
    lambda x: section(OLD, threshold_scale_factor=x),
    lambda x: section(OLD, threshold_scale_factor={"prefill": x}),
    lambda x: section(OLD, **{str(x): 3}),
    lambda x: section({**OLD, "threshold": x}),
    lambda x: {"algorithm": "skip_softmax", "threshold_scale_factor": x},
    lambda x: {"threshold_scale_factor": 3, "algorithm": x},
]


@pytest.mark.parametrize("hole", HOLES)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(filling=JSON)
def test_nothing_else_comes_out(tmp_path: Path, hole: Callable[[Any], Any], filling: Any) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(hole(filling)))
    try:
        made = import_profile(path, FACTS)
    except SparsePrefillError:
        return
    assert isinstance(made.profile.defaults, Sale)
