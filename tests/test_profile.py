"""Profile files: what loads, what it means, and what is said of those that are wrong."""

from __future__ import annotations

import copy
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_sparse_backend.errors import ProfileError, ProfileMismatch, SparsePrefillError
from vllm_sparse_backend.profile import (
    MAX_BYTES,
    ModelFacts,
    Profile,
    architecture_digest,
    load_profile,
    local_heads,
    schema,
)
from vllm_sparse_backend.profiles import shipped_for
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, Policy, Sale, Static

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64
)
SIZES = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
HAND_WRITTEN: dict[str, Any] = {
    "format": "vllm-sparse-profile",
    "version": 1,
    "model": {
        "architecture": "LlamaForCausalLM",
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
    },
    "defaults": {"selector": "sale", "tau": 0.008},
    "policies": {"0": {"*": {"selector": "dense"}}, "7": {"3": {"selector": "static"}}},
}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """The hand-written profile; a key with dots of it, as a__b, is set, or removed by None."""
    profile = copy.deepcopy(HAND_WRITTEN)
    for name, value in changes.items():
        *path, last = name.split("__")
        at = profile
        for part in path:
            at = at.setdefault(part, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    return profile


def test_a_hand_written_profile(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path / "mine.json", HAND_WRITTEN))
    assert profile.name == "mine"
    profile.match(FACTS)
    assert profile.for_layer(0) == [DENSE] * 9
    assert profile.for_layer(7) == [Sale(tau=0.008)] * 3 + [Static()] + [Sale(tau=0.008)] * 5
    assert profile.for_layer(29) == [Sale(tau=0.008)] * 9


def test_a_generated_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    policies: dict[int, dict[int, Policy]] = {
        layer: {head: Sale(tau=(layer + 1) / 1000, tile=32) for head in range(9)}
        for layer in range(30)
    }
    policies[3][4] = Static(growth=0.1)
    digest = architecture_digest(FACTS, **SIZES)
    profile = Profile.build(
        FACTS.model_copy(update={"digest": digest}),
        policies,
        name="made",
        calibration={"texts": ["a novel"], "lengths": [8192], "error_budget": 0.02, "seed": 1},
    )
    path = tmp_path / "made.json"
    profile.save(path)
    assert load_profile(path) == profile
    assert load_profile(path).digest == profile.digest
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["made.json"]
    for layer in (0, 3, 29):
        assert profile.for_layer(layer) == [policies[layer][head] for head in range(9)]
    profile.match(FACTS.model_copy(update={"digest": digest}))
    profile.match(FACTS)  # a model whose digest is not known
    assert shipped_for("sha256:" + "0" * 64) is None
    assert shipped_for(None) is None


def test_no_policies_at_all_is_the_uniform_default(tmp_path: Path) -> None:
    small = changed(defaults=None, policies=None)
    profile = load_profile(write(tmp_path / "p.json", small))
    assert profile.for_layer(5) == [UNIFORM_DEFAULT] * 9


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p.json", HAND_WRITTEN)
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        Profile.build(FACTS, {}).save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


BAD: dict[str, tuple[object, str]] = {
    "unknown field": (
        changed(polices={}),
        "polices: unknown field (did you mean 'policies'?)",
    ),
    "unknown field of the model": (changed(model__heads=9), "model.heads: unknown field"),
    "unknown field of a policy": (
        changed(defaults={"selector": "dense", "tau": 0.1}),
        "defaults.dense.tau: unknown field",
    ),
    "missing field": (changed(model__head_dim=None), "model.head_dim: missing"),
    "no version": (changed(version=None), "version: missing"),
    "another version": (changed(version=2), "version: input should be 1, got 2"),
    "another format": (changed(format="safetensors"), "format: input should be "),
    "truncated": (json.dumps(HAND_WRITTEN)[:-20], "not valid JSON: "),
    "empty": ("", "not valid JSON: "),
    "a list": ("[]", "file: input should be an object, got []"),
    "NaN": (
        json.dumps(HAND_WRITTEN).replace("0.008", "NaN"),
        "defaults.sale.tau: input should be a finite number, got nan",
    ),
    "infinity": (json.dumps(HAND_WRITTEN).replace("0.008", "1e999"), "defaults.sale.tau: "),
    "threshold out of range": (changed(defaults__tau=-0.5), "greater than or equal to 0, got -0.5"),
    "a number as text": (changed(model__num_heads="9"), "valid integer, got '9'"),
    "no heads": (changed(model__num_heads=0), "model.num_heads: "),
    "unknown selector": (changed(defaults={"selector": "magic"}), "defaults: "),
    "a layer that is no number": (changed(policies={"first": {}}), "policies.first"),
    "a head that is no number": (changed(policies={"0": {"-1": {}}}), "policies.0.-1"),
    "a leading zero": (changed(policies={"07": {}}), "policies.07"),
    "a key twice": (
        json.dumps(HAND_WRITTEN).replace('"policies"', '"version": 1, "policies"'),
        "the key 'version' stands twice in one object",
    ),
    "a head twice": (
        json.dumps(changed(policies={"0": {"1": {"selector": "dense"}}})).replace(
            '"1": {"sel', '"1": {"selector": "static"}, "1": {"sel'
        ),
        "the key '1' stands twice",
    ),
    "deep nesting": ("[" * 200_000, ""),
    "deep nesting of objects": ('{"a":' * 200_000, ""),
    "garbage": ("\0garbage" * 1000, "not valid JSON: "),
    "lone surrogate": ('"\\ud800"', ""),
    "huge number": (changed(model__num_layers=10**400), "model.num_layers: "),
    "too many digits": (json.dumps(HAND_WRITTEN).replace("30", "9" * 5000), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ProfileError, match=re.escape(message or "profile")) as caught:
        load_profile(path)
    text = str(caught.value)
    assert text.startswith(f"profile {path}: ")
    assert len(text) > len(f"profile {path}: ")
    assert "\n" not in text
    assert len(text) < 600
    assert isinstance(caught.value, SparsePrefillError)


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 20) * 50)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, message in (
        (tmp_path / "none.json", "No such file or directory"),
        (tmp_path, "want a regular file, got a directory"),
        (pipe, "want a regular file, got something else"),
        (Path("/dev/zero"), "want a regular file, got something else"),
        (large, f"want at most {MAX_BYTES} bytes, got {50 << 20}"),
        (binary, "not UTF-8 text"),
        (loop, "symbolic link"),
        (Path("a\0b"), "embedded null byte"),
    ):
        with pytest.raises(ProfileError, match=message):
            load_profile(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("architecture", "GemmaForCausalLM"), ("num_layers", 31), ("num_heads", 12),
     ("num_kv_heads", 9), ("head_dim", 128)],
)  # fmt: skip
def test_a_profile_of_another_model_names_the_number(name: str, value: object) -> None:
    profile = Profile.build(FACTS, {}, name="mine")
    with pytest.raises(ProfileMismatch) as caught:
        profile.match(FACTS.model_copy(update={name: value}))
    ours = getattr(FACTS, name)
    assert str(caught.value) == (
        f"profile 'mine' does not fit the model: {name}: the profile has {ours}, the model {value}"
    )


def test_more_that_does_not_fit() -> None:
    other = FACTS.model_copy(update={"num_heads": 8, "head_dim": 80})
    with pytest.raises(ProfileMismatch, match=r"num_heads: .*; head_dim: "):
        Profile.build(FACTS, {}).match(other)
    digests = [FACTS.model_copy(update={"digest": "sha256:" + c * 64}) for c in "ab"]
    with pytest.raises(ProfileMismatch, match="digest: the profile has sha256:aaa"):
        Profile.build(digests[0], {}).match(digests[1])
    with pytest.raises(ProfileMismatch, match=r"policies.30: the model has layers 0 to 29"):
        Profile.build(FACTS, {30: {0: DENSE}}).match(FACTS)
    with pytest.raises(ProfileMismatch, match=r"policies.2.9: the model has heads 0 to 8"):
        Profile.build(FACTS, {2: {9: DENSE}}).match(FACTS)
    with pytest.raises(ValidationError, match="digest"):
        ModelFacts.model_validate({**FACTS.model_dump(), "digest": "md5:0"})


def test_heads_of_tensor_parallel_ranks() -> None:
    policies: list[Policy] = [Sale(tau=head / 100) for head in range(12)]
    for size in (1, 2, 3, 4):
        shares = [local_heads(policies, rank, 12 // size) for rank in range(size)]
        assert [policy for share in shares for policy in share] == policies
    for rank, count in ((2, 6), (-1, 6), (0, 13), (3, 5)):
        with pytest.raises(ValueError, match=f"rank {rank}: want {count} heads .* has 12"):
            local_heads(policies, rank, count)


def test_digests_are_of_what_they_say() -> None:
    digest = architecture_digest(FACTS, **SIZES)
    # Written down, so that a change of how it is made does not orphan the profiles there are.
    assert digest == "sha256:02eb3c88021727e2ac5d85c0a5f12002a533e03c02aaba8b74a9bf71aaaf01a3"
    assert digest == architecture_digest(FACTS.model_copy(update={"digest": digest}), **SIZES)
    for name, value in SIZES.items():
        assert architecture_digest(FACTS, **{**SIZES, name: f"{value}0"}) != digest
    assert architecture_digest(FACTS.model_copy(update={"num_layers": 31}), **SIZES) != digest
    one = Profile.build(FACTS, {1: {2: DENSE}}, name="a")
    assert one.digest == Profile.build(FACTS, {1: {2: DENSE}}, name="b").digest
    assert one.digest != Profile.build(FACTS, {1: {3: DENSE}}, name="a").digest
    assert one.digest != Profile.build(FACTS, {1: {2: DENSE}}, defaults=DENSE).digest


def test_the_schema_is_one() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(HAND_WRITTEN)
    validator.validate(json.loads(Profile.build(FACTS, {0: {0: Static()}}).model_dump_json()))
    for bad in (changed(version=2), changed(polices={}), changed(model__num_heads="9")):
        assert list(validator.iter_errors(bad))
