"""Others' profiles in and ours out: what is kept, what is refused, and with which words."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_sparse_backend.cli import app
from vllm_sparse_backend.errors import ProfileError, SparsePrefillError
from vllm_sparse_backend.exchange import Source, Unsupported, import_profile, minference
from vllm_sparse_backend.ops.tiles import q_blocks
from vllm_sparse_backend.profile import ModelFacts, Profile, load_profile
from vllm_sparse_backend.selection import DENSE, Dense, ListSelector, Mass, Policy, Sale, Static
from vllm_sparse_backend.selection.block_topk import BlockTopK
from vllm_sparse_backend.selection.static import always_kept
from vllm_sparse_backend.selection.vertical_slash import VerticalSlash

Write = Callable[[str, str | bytes], Path]
FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)
A_SHAPE = ["stream_llm", 100, 800, 0.75]
EVERYTHING = minference.EVERYTHING
BARE: Any = {"sink": 16, "local": 0}  # as little as a list selector can always keep


def layer(**heads: list[Any]) -> dict[str, list[Any]]:
    """A layer of A-shapes but for the heads named, as h0=..., h1=..."""
    return {str(n): heads.get(f"h{n}", A_SHAPE) for n in range(FACTS.num_heads)}


def calibrated(**group: Any) -> dict[str, Any]:
    """A config.json with a skip-softmax group, with changes."""
    fit = {"a": 8.0, "b": 2.0}
    return {
        "architectures": ["LlamaForCausalLM"],
        "sparse_attention_config": {
            "config_groups": {
                "group_0": {
                    "algorithm": "skip_softmax",
                    "targets": ["LlamaAttention"],
                    "threshold_scale_factor": {
                        "formula": "a * exp(b * target_sparsity)",
                        "prefill": fit,
                        "decode": fit,
                    },
                    "target_sparsity": {"prefill": 0.25},
                    **group,
                }
            },
            "producer": {"name": "modelopt", "version": "0"},
        },
    }


@pytest.fixture
def take(write: Write) -> Callable[..., Any]:
    """Import contents given as Python data or as text."""

    def imported(
        data: Any, source: Source | None = None, unsupported: Unsupported = "error"
    ) -> Any:
        text = data if isinstance(data, str | bytes) else json.dumps(data)
        return import_profile(write("theirs.json", text), FACTS, source, unsupported)

    return imported


# MInference


def test_an_a_shape_becomes_static_in_whole_tiles(take: Callable[..., Any]) -> None:
    profile = take([layer(), layer(h3=["stream_llm", 0, 1, 0.0])]).profile
    assert profile.for_layer(0) == [Static(sink=112, local=800)] * 4
    assert profile.for_layer(1)[3] == Static(sink=16, local=0)
    assert profile.name == "theirs"


@pytest.mark.parametrize(("sink", "window"), [(100, 800), (0, 1), (17, 33), (1, 64), (64, 65)])
def test_what_an_a_shape_keeps_is_kept(take: Callable[..., Any], sink: int, window: int) -> None:
    shape = ["stream_llm", sink, window, 1.0]
    policy = take([layer(h0=shape), layer()]).profile.for_layer(0)[0]
    for block in q_blocks(1000, 1000):
        kept = always_kept(policy, block.start, block.end).repeat_interleave(policy.tile)
        for row in range(block.first, block.end):
            wanted = [*range(min(sink, row + 1)), *range(max(0, row - window + 1), row + 1)]
            assert kept[wanted].all()


def test_a_window_that_holds_everything_is_dense(take: Callable[..., Any]) -> None:
    everything = ["stream_llm", 16, EVERYTHING, 1.0]
    made = take([layer(h1=everything), layer()])
    assert made.profile.for_layer(0)[1] == DENSE
    assert made.notes == ("of 8 heads: 1 dense, 7 static",)


@pytest.mark.parametrize(
    ("pattern", "policy"),
    [
        (
            ["vertical_and_slash", 1000, 6096, 0.9],
            VerticalSlash(columns=1000, diagonals=6096, **BARE),
        ),
        (["vertical_and_slash", 0, 50, 0.9], VerticalSlash(columns=30, diagonals=100, **BARE)),
        (["vertical_and_slash", 30, EVERYTHING, 0.9], DENSE),
        (["block_sparse", 7, 7, 0.9], BlockTopK(blocks=100, **BARE)),
    ],
)
def test_the_other_patterns_become_list_selectors(
    take: Callable[..., Any], pattern: list[Any], policy: Policy
) -> None:
    made = take([layer(), layer(h2=pattern)])
    assert made.profile.for_layer(1) == [
        *[Static(sink=112, local=800)] * 2,
        policy,
        Static(sink=112, local=800),
    ]
    assert f"1 {policy.selector}" in made.notes[0]
    assert (len(made.notes) == 2) == isinstance(policy, ListSelector)


def test_a_head_that_is_not_listed_is_what_it_is_to_minference(take: Callable[..., Any]) -> None:
    unlisted = VerticalSlash(columns=1000, diagonals=6096, **BARE)
    assert take([{}, layer()]).profile.for_layer(0) == [unlisted] * 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([layer()], "layers: the file has 1, LlamaForCausalLM 2"),
        ([layer(), layer() | {"4": A_SHAPE}], "layer 1, head 4: the model has heads 0 to 3"),
        ([layer(), layer(h0=["diagonal", 1, 1, 1.0])], "1.0.0: input should be 'stream_llm'"),
        ([layer(), layer(h0=["stream_llm", 1, 1])], "1.0.3: missing"),
        ([layer(), layer(h0=["stream_llm", -1, 1, 1.0])], "1.0.1: .*got -1"),
        ([layer(), layer(h0=["stream_llm", 1.5, 1, 1.0])], "1.0.1: .*got 1.5"),
        ([layer(), layer(h0=["stream_llm", 1, 0, 1.0])], "layer 1, head 0: want a window of 1"),
        ([layer(), {"first": A_SHAPE}], "1.first"),
        ([layer(), None], "1: .*got None"),
    ],
)
def test_a_malformed_pattern_file_is_refused(
    take: Callable[..., Any], data: Any, said: str
) -> None:
    with pytest.raises(ProfileError, match=f"theirs.json: {said}"):
        take(data)


# Model Optimizer


def test_a_skip_softmax_threshold_becomes_sales(take: Callable[..., Any]) -> None:
    made = take(calibrated())
    policy = made.profile.defaults
    assert isinstance(policy, Sale) and not made.profile.policies
    for tokens in 4096, 8192, 100_000:
        assert policy.tau_at(tokens) == pytest.approx(8.0 * math.exp(2.0 * 0.25) / tokens)
    assert "sparsity of 0.25" in made.notes[0]


def test_the_section_alone_and_a_target_of_any_form(take: Callable[..., Any]) -> None:
    section = calibrated(target_sparsity=0.25)["sparse_attention_config"]
    assert take(section).profile.defaults == take(calibrated()).profile.defaults
    without = calibrated()
    del without["sparse_attention_config"]["config_groups"]["group_0"]["target_sparsity"]
    assert take(without).profile.defaults.tau == pytest.approx(8.0 * math.exp(1.0) / 8192)


def test_a_config_json_is_called_after_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "some-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(calibrated()))
    assert import_profile(path, FACTS).profile.name == "some-model"


def test_modules_left_out_stay_dense(take: Callable[..., Any]) -> None:
    made = take(calibrated(ignore=["model.layers.1.self_attn"]))
    assert made.profile.for_layer(1) == [DENSE] * 4
    assert made.profile.for_layer(0) == [made.profile.defaults] * 4
    assert made.notes[1] == "dense as in the file: layers 1"


def test_sparse_softmax_has_no_selector(take: Callable[..., Any]) -> None:
    data = calibrated()
    groups = data["sparse_attention_config"]["config_groups"]
    groups["group_1"] = {"algorithm": "sparse_softmax", "sparsity_n": 2, "sparsity_m": 4}
    with pytest.raises(ProfileError, match="sparse_softmax, for which there is no selector here"):
        take(data)
    made = take(data, unsupported="dense")
    assert made.profile.defaults == take(calibrated()).profile.defaults
    assert made.notes[1] == "left out since there is no selector for it yet: sparse_softmax"


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"threshold_scale_factor": {"decode": {"a": 1, "b": 1}}}, ".*prefill: missing"),
        ({"threshold_scale_factor": {"prefill": {"a": 0, "b": 1}}}, ".*greater than 0, got 0"),
        ({"threshold_scale_factor": {"prefill": {"a": 1e9, "b": 1}}}, ".*want more than 0 and"),
        ({"threshold_scale_factor": {"prefill": {"a": 1, "b": 1e9}}}, ".*a threshold of inf"),
        (
            {"threshold_scale_factor": {"formula": "a", "prefill": {"a": 1, "b": 1}}},
            ".*formula: .*got 'a'",
        ),
        ({"target_sparsity": 2}, ".*less than or equal to 1"),
        ({"ignore": ["model.layers.2.self_attn"]}, "ignore: want modules of layers 0 to 1"),
        ({"ignore": ["vision"]}, "ignore: .*got 'vision'"),
        ({"ignore": ["*vision*"]}, "ignore: .*got '[*]vision[*]', which matches none"),
        ({"ignore": ["*layers.7.*"]}, "ignore: .*which matches none"),
        ({"initial_disabled_steps": 3}, ".*initial_disabled_steps"),
        ({"per_head": {}}, ".*per_head: unknown field"),
        ({"algorithm": "vsa"}, "all layers and heads want vsa"),
    ],
)
def test_a_malformed_calibration_is_refused(
    take: Callable[..., Any], group: dict[str, Any], said: str
) -> None:
    with pytest.raises(ProfileError, match=f"theirs.json: {said}"):
        take(calibrated(**group))


def test_an_uncalibrated_group_has_no_threshold(take: Callable[..., Any]) -> None:
    data = {"config_groups": {"group_0": {"algorithm": "skip_softmax"}}}
    with pytest.raises(ProfileError, match="it was not calibrated"):
        take(data)


# Any file


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "not valid JSON"),
        (b"\xff", "not UTF-8 text"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "found neither"),
        ({}, "found neither"),
        ({"format": "vllm-sparse-profile"}, "a profile already"),
    ],
)
def test_what_is_no_profile_of_anybodys(take: Callable[..., Any], data: Any, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        take(data)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path in tmp_path, tmp_path / "none.json", Path("\0"):
        with pytest.raises(ProfileError):
            import_profile(path, FACTS)


def test_the_source_that_is_named_is_believed(take: Callable[..., Any]) -> None:
    with pytest.raises(ProfileError, match="want a list of layers, got dict"):
        take(calibrated(), source="minference")
    with pytest.raises(ProfileError, match="config_groups"):
        take([layer(), layer()], source="modelopt")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
HOLES: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: [layer(), x],
    lambda x: [layer(), layer(h1=x)],
    lambda x: [layer(), layer(h1=["stream_llm", x, 8, 1.0])],
    lambda x: [layer(), layer(h1=["stream_llm", 8, x, 1.0])],
    lambda x: [layer(), layer(h1=[x, 8, 8, 1.0])],
    lambda x: {"sparse_attention_config": x},
    lambda x: {"sparse_attention_config": {"config_groups": x}},
    lambda x: {"config_groups": {"group_0": x}},
    lambda x: calibrated(algorithm=x),
    lambda x: calibrated(ignore=x),
    lambda x: calibrated(ignore=[x]),
    lambda x: calibrated(target_sparsity=x),
    lambda x: calibrated(threshold_scale_factor=x),
    lambda x: calibrated(threshold_scale_factor={"prefill": {"a": x, "b": 1}}),
    lambda x: calibrated(threshold_scale_factor={"prefill": {"a": 1, "b": x}}),
    lambda x: {"config_groups": {"group_0": {"algorithm": x}, **calibrated()}},
]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hole=st.sampled_from(HOLES), filling=JSON, dense=st.booleans())
def test_nothing_else_comes_out(
    tmp_path: Path, hole: Callable[[Any], Any], filling: Any, dense: bool
) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(hole(filling)))
    try:
        made = import_profile(path, FACTS, None, "dense" if dense else "error")
    except SparsePrefillError:
        return
    made.profile.save(tmp_path / "ours.json")
    assert load_profile(tmp_path / "ours.json") == made.profile


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_nothing_else_comes_out_of_bytes(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "theirs.json"
    path.write_bytes(contents)
    with pytest.raises(SparsePrefillError):
        import_profile(path, FACTS)


# Out again

TILED = st.integers(1, 64).map(lambda tiles: tiles * 16)
SAID = st.one_of(
    st.just(DENSE),
    st.builds(Static, sink=TILED, local=TILED),
    st.just(BlockTopK(**BARE)),
    st.builds(
        VerticalSlash,
        columns=st.integers(30, 1 << 20),
        diagonals=st.integers(100, 1 << 20),
        sink=st.just(16),
        local=st.just(0),
    ),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SAID, min_size=8, max_size=8))
def test_a_round_trip_changes_no_policy(tmp_path: Path, policies: list[Policy]) -> None:
    heads = {n: dict(enumerate(policies[4 * n : 4 * n + 4])) for n in range(2)}
    path = tmp_path / "theirs.json"
    path.write_text(minference.write(Profile.build(FACTS, heads)))
    again = import_profile(path, FACTS).profile
    assert [again.for_layer(n) for n in range(2)] == [policies[:4], policies[4:]]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Sale(), "layer 1, head 2: sale has no pattern"),
        (Mass(), "layer 1, head 2: mass has no pattern"),
        (VerticalSlash(), "layer 1, head 2: vertical_slash has no pattern"),
        (BlockTopK(blocks=50, **BARE), "layer 1, head 2: block_topk has no pattern"),
        (Static(growth=0.1), "layer 1, head 2: static has no pattern"),
    ],
)
def test_the_first_head_that_cannot_be_said_is_named(policy: Policy, said: str) -> None:
    profile = Profile.build(FACTS, {1: {2: policy, 3: policy}}, defaults=Static())
    with pytest.raises(ProfileError, match=said):
        minference.write(profile)


def test_a_threshold_of_zero_is_dense() -> None:
    written = json.loads(minference.write(Profile.build(FACTS, {}, defaults=Sale(tau=0))))
    assert written[0]["0"] == ["stream_llm", 16, EVERYTHING, 1.0]


# The commands


def test_export_writes_nothing_it_cannot_say(tmp_path: Path) -> None:
    profile, out = tmp_path / "ours.json", tmp_path / "theirs.json"
    for defaults, status in (Sale(), 2), (Dense(), 0):
        Profile.build(FACTS, {}, defaults=defaults).save(profile)
        arguments = ["export", str(profile), "--to", "minference", "-o", str(out)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == status, done.output
        assert out.exists() == (status == 0)


def test_import_writes_nothing_it_cannot_compute(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_sparse_backend.doctor.model_facts", lambda model: FACTS)
    other = calibrated(algorithm="other")
    theirs, out = write("config.json", json.dumps(other)), tmp_path / "ours.json"
    arguments = ["import", str(theirs), "--model", "org/name", "-o", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "all layers and heads want other" in done.output
    assert not out.exists()


def test_import_asks_vllm_for_the_models_numbers(
    tmp_path: Path, tiny_llama: Path, write: Write
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    heads = {str(n): A_SHAPE for n in range(config["num_attention_heads"])}
    theirs = write("theirs.json", json.dumps([heads] * config["num_hidden_layers"]))
    out = tmp_path / "ours.json"
    arguments = ["import", str(theirs), "--model", str(tiny_llama), "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", "from vllm_sparse_backend.cli import app; app()", *arguments],
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = load_profile(out)
    assert made.kinds() == {Static(sink=112, local=800)}
    assert made.model.digest is not None
