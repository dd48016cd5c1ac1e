"""What a request may ask for: read, refused, kept apart in the prefix cache, and planned."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _batch import engine_config
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from vllm_sparse_backend import compat_connectors, control
from vllm_sparse_backend.backend.admission import Admission
from vllm_sparse_backend.control import DEFAULT, FIELD, ControlError, Setting

SCALES = st.floats(control.LEAST_SCALE, control.MOST_SCALE)
SETTINGS = st.one_of(
    st.just(DEFAULT), st.just(Setting(off=True)), st.builds(Setting, threshold_scale=SCALES)
)
SALTS = st.one_of(
    st.none(),
    st.text(min_size=1, max_size=200),
    st.builds(lambda setting, rest: f"{control.SALT}{setting.text};{rest}", SETTINGS, st.text()),
    st.builds(control.salted, SETTINGS, st.text(min_size=1)),
)


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        ("on", DEFAULT),
        ("off", Setting(off=True)),
        ("threshold_scale=2", Setting(threshold_scale=2.0)),
        (" threshold_scale = 0.5 ", Setting(threshold_scale=0.5)),
        ({"threshold_scale": 2}, Setting(threshold_scale=2.0)),
        ({"threshold_scale": 1}, DEFAULT),
        ("threshold_scale=1e1", Setting(threshold_scale=10.0)),
    ],
)
def test_a_setting_in_each_way_to_write_it(value: object, setting: Setting) -> None:
    assert control.parse(value) == setting


WRONG: list[tuple[object, str]] = [
    ("maybe", r"sparse_prefill: want \"on\", \"off\" or \"threshold_scale=X\".*got 'maybe'"),
    ("ON", "got 'ON'"),
    ("", "got ''"),
    (True, "got True"),
    (0, "got 0"),
    (2.0, "got 2.0"),
    (None, "got None"),
    (["off"], r"got \['off'\]"),
    ("x" * 1000, r"got 'x{10,60}\.\.\."),
    ("threshold_scale=", "threshold_scale: input should be a valid number.*got ''"),
    ("threshold_scale=2=3", "threshold_scale: input should be a valid number.*got '2=3'"),
    ("threshold_scale=nan", "threshold_scale: input should be a finite number"),
    ("threshold_scale=inf", "threshold_scale: input should be a finite number"),
    ("threshold_scale=0", "threshold_scale: input should be greater than or equal to 0.01"),
    ("threshold_scale=-1", "threshold_scale: input should be greater than or equal to 0.01"),
    ("threshold_scale=101", "threshold_scale: input should be less than or equal to 100"),
    ("treshold_scale=2", "treshold_scale: unknown field .did you mean 'threshold_scale'"),
    ("error_budget=0.01", "error_budget: a profile holds one threshold.*want threshold_scale"),
    ({"error_budget": 0.01}, "error_budget: a profile holds one threshold"),
    ({}, "threshold_scale: missing"),
    ({"threshold_scale": "2"}, "threshold_scale: input should be a valid number, got '2'"),
    ({"threshold_scale": True}, "threshold_scale: input should be a valid number, got True"),
    ({"threshold_scale": 2, "off": True}, "off: unknown field"),
    ({"admitted": "off"}, "admitted: unknown field"),
    ({"a\nb": 1}, "a b: unknown field"),
    ("x" * 1000 + "=1", "x{200}"),
]


@pytest.mark.parametrize(("value", "says"), WRONG, ids=[repr(v)[:30] for v, _ in WRONG])
def test_garbage_is_refused_by_name(value: object, says: str) -> None:
    with pytest.raises(ControlError, match=says) as caught:
        control.asked({FIELD: value})
    message = str(caught.value)
    assert message.startswith("sparse_prefill: ")
    assert "\n" not in message and len(message) < 400


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)


@budget(max_examples=300, deadline=None, derandomize=True)
@given(
    st.one_of(
        JSON,
        st.builds(lambda a, b: f"{a}={b}", st.text(), st.text()),
        st.builds(lambda b: f"threshold_scale={b}", st.one_of(st.text(), st.floats().map(str))),
        st.dictionaries(st.sampled_from(["threshold_scale", "error_budget", "off"]), JSON),
    )
)
def test_whatever_comes_is_a_setting_or_refused(value: object) -> None:
    try:
        setting = control.parse(value)
    except ControlError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return
    assert control.parse(setting.text) == setting


def test_a_name_beside_ours_is_refused() -> None:
    for name in ("sparse-prefill", "SPARSE_PREFILL", "sparseprefill", "Sparse-Prefill"):
        with pytest.raises(ControlError, match=f"want the name 'sparse_prefill', got '{name}'"):
            control.asked({name: "off"})
    assert control.asked({"session_id": "x", "sparse": "off"}) is None
    assert control.asked({}) is control.asked(None) is None


@budget(max_examples=300, deadline=None, derandomize=True)
@given(st.tuples(SETTINGS, SALTS), st.tuples(SETTINGS, SALTS))
def test_two_requests_share_a_salt_only_if_they_ask_for_the_same_with_the_same(
    one: tuple[Setting, str | None], other: tuple[Setting, str | None]
) -> None:
    salts = control.salted(*one), control.salted(*other)
    assert (salts[0] == salts[1]) == (one == other)


@budget(max_examples=200, deadline=None, derandomize=True)
@given(SETTINGS, SALTS)
def test_salts_are_within_what_vllm_allows(setting: Setting, salt: str | None) -> None:
    from vllm.entrypoints.generate.base.protocol import validate_cache_salt

    composed = control.salted(setting, salt)
    if composed == salt:
        assert setting == DEFAULT  # the user's own, which vLLM has checked or not
    else:
        validate_cache_salt(composed)


@budget(max_examples=200, deadline=None, derandomize=True)
@given(SETTINGS, st.dictionaries(st.sampled_from(["session_id", "other"]), JSON, max_size=2))
def test_what_is_admitted_is_what_workers_receive(setting: Setting, others: dict[str, Any]) -> None:
    given = {**others, FIELD: setting.text}
    before = dict(given)
    sent = control.admitted(given, setting)
    assert given == before
    assert {name: value for name, value in sent.items() if name != FIELD} == others
    assert control.received(sent) == setting


@pytest.mark.parametrize("value", ["off", "threshold_scale=2", {"threshold_scale": 2.0}, 1, None])
def test_what_nobody_has_admitted_is_not_followed(value: object) -> None:
    with pytest.raises(ControlError, match="past the server's own checks"):
        control.received({FIELD: value})


# Where it is looked at


@needs_core
def test_audio_endpoints_ask_before_they_answer(tiny_llama: Path) -> None:
    from fastapi import UploadFile
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
    from vllm.v1.engine.input_processor import InputProcessor

    InputProcessor(engine_config(tiny_llama, MASS))
    for kind in TranscriptionRequest, TranslationRequest:

        def request(value: str, kind: Any = kind) -> Any:
            xargs = json.dumps({FIELD: value})  # as a form has it
            return kind(file=UploadFile(io.BytesIO()), vllm_xargs=xargs)

        assert request("off").to_sampling_params(5).extra_args == {FIELD: "off"}
        with pytest.raises(ControlError, match='want "on", "off" or'):
            request("maybe").to_sampling_params(5)
        with pytest.raises(ControlError, match="want a request without use_beam_search"):
            request("off").to_beam_search_params(5)


# What a server can do

MASS = {"min_prompt_tokens": 512, "policy": {"selector": "mass", "tau": 0.01}}
OFF, SCALED = Setting(off=True), Setting(threshold_scale=2.0)


def admission(model: Path, section: dict[str, Any], **more: Any) -> Callable[[str], Setting]:
    takes = Admission(engine_config(model, section, **more))
    return lambda value: takes({FIELD: value})


@needs_core
def test_a_server_with_thresholds_takes_everything(tiny_llama: Path) -> None:
    takes = admission(tiny_llama, MASS)
    assert takes("on") == DEFAULT
    assert takes("off") == OFF
    assert takes("threshold_scale=2") == SCALED
    assert Admission(engine_config(tiny_llama, MASS))({"session_id": "x"}) == DEFAULT


@needs_core
@pytest.mark.parametrize(
    ("section", "more", "says"),
    [
        ({"enabled": False}, {}, "enabled is false"),
        ({}, {"max_model_len": 1024}, "max_model_len is 1024, min_prompt_tokens 2048"),
        ({}, {"kv_cache_dtype": "fp8"}, "every layer is: quantized_kv"),
    ],
)
def test_where_nothing_is_sparse_nobody_may_ask_for_it(
    tiny_llama: Path, section: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    import torch

    if "kv_cache_dtype" in more and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has no FP8 KV cache on a CPU without AVX-512")
    takes = admission(tiny_llama, section, **more)
    for value in ("on", "threshold_scale=2"):
        with pytest.raises(ControlError, match=f"want 'off' or nothing, got .*{says}"):
            takes(value)
    assert takes("off") == (DEFAULT if section else OFF)


CONNECTORS: list[tuple[str, dict[str, Any], str | None]] = [
    ("NixlConnector", {}, None),
    ("OffloadingConnector", {}, None),
    ("ExampleConnector", {}, "ExampleConnector"),
    ("LMCacheConnectorV1", {}, "LMCacheConnectorV1"),
    ("HF3FSKVConnector", {}, "HF3FSKVConnector"),
    # Somebody else's of the same name.
    ("NixlConnector", {"kv_connector_module_path": "their.own"}, "their.own.NixlConnector"),
]


@needs_core
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("name", "more", "unsalted"), CONNECTORS)
def test_settings_need_a_kv_connector_that_keeps_them_apart(
    tiny_llama: Path, name: str, more: dict[str, Any], unsalted: str | None, several: bool
) -> None:
    from vllm.config import KVTransferConfig

    one = {"kv_connector": name, "kv_role": "kv_both", **more}
    children = [{"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"}, one]
    multi: dict[str, Any] = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    multi["kv_connector_extra_config"] = {"connectors": children}
    config = engine_config(tiny_llama, MASS)
    config.kv_transfer_config = KVTransferConfig(**(multi if several else one))
    takes = Admission(config)
    assert takes(None) == takes({FIELD: "on"}) == DEFAULT
    for value in "off", "threshold_scale=2":
        if unsalted is None:
            assert takes({FIELD: value}) == control.parse(value)
        else:
            says = f"want 'on' or nothing, got .*: the KV connector {unsalted} is not known to keep"
            with pytest.raises(ControlError, match=says):
                takes({FIELD: value})


def test_the_connectors_that_are_named_are_vllms() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert {*compat_connectors.SALTED, compat_connectors.MULTI} <= set(KVConnectorFactory._registry)


@needs_core
@pytest.mark.parametrize(
    "policy", [{"selector": "static"}, {"selector": "dense"}, {"selector": "sale", "tau": 0.0}]
)
def test_without_a_threshold_there_is_nothing_to_scale(
    tiny_llama: Path, policy: dict[str, Any]
) -> None:
    takes = admission(tiny_llama, {"policy": policy})
    with pytest.raises(ControlError, match=r"want 'on' or 'off', got 'threshold_scale=2\.0'"):
        takes("threshold_scale=2")
    assert takes("off") == OFF


@needs_core
def test_one_head_with_a_threshold_is_enough(
    tiny_llama: Path, write: Callable[[str, str | bytes], Path]
) -> None:
    facts = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    profile = {
        "format": "vllm-sparse-profile",
        "version": 1,
        "model": {"architecture": "LlamaForCausalLM", **facts},
        "defaults": {"selector": "static"},
        "policies": {"1": {"2": {"selector": "sale", "tau": 0.1}}},
    }
    path = write("profile.json", json.dumps(profile))
    assert admission(tiny_llama, {"profile": str(path)})("threshold_scale=2") == SCALED
