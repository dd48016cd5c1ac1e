"""The configuration: each field by both ways in, and one clear line for what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_sparse_backend.config import (
    ENV_PREFIX,
    SECTION,
    SparseConfig,
    allowed_plugins,
    environment_names,
    load_config,
    overrides_in,
    prometheus_multiprocess,
    refuse_overrides,
    session_directory,
)
from vllm_sparse_backend.errors import ConfigError, SparsePrefillError
from vllm_sparse_backend.selection import DENSE, Sale

# Of every field: a value that is not its default, in JSON and in the environment.
VALUES: dict[str, tuple[Any, str, Any]] = {
    "enabled": (False, "false", False),
    "profile": ("/some/file.json", "/some/file.json", "/some/file.json"),
    "profile_digest": (f"sha256:{'ab' * 32}", f"sha256:{'ab' * 32}", f"sha256:{'ab' * 32}"),
    "policy": ({"selector": "dense"}, '{"selector": "dense"}', DENSE),
    "min_prompt_tokens": (77, "77", 77),
    "min_query_tokens": (5, "5", 5),
    "dense_core": (False, "false", False),
    "kept_prompts": (2, "2", 2),
    "cpu_isa": ("avx2", "avx2", "avx2"),
}


def load(environ: dict[str, str] | None = None, **fields: Any) -> SparseConfig:
    return load_config({SECTION: fields}, environ or {})


def test_every_field_is_tried_here() -> None:
    assert set(VALUES) == set(SparseConfig.model_fields)
    assert environment_names() == [ENV_PREFIX + name.upper() for name in SparseConfig.model_fields]


@pytest.mark.parametrize("name", VALUES)
def test_a_field_by_json_and_by_the_environment(name: str) -> None:
    value, text, wanted = VALUES[name]
    default = SparseConfig()
    assert getattr(default, name) != wanted
    variable = ENV_PREFIX + name.upper()
    for config in (load(**{name: value}), load({variable: text})):
        assert getattr(config, name) == wanted
        assert config.model_copy(update={name: getattr(default, name)}) == default
        with pytest.raises(ValidationError):
            setattr(config, name, wanted)


def test_the_environment_comes_before_the_command_line() -> None:
    assert load({ENV_PREFIX + "MIN_PROMPT_TOKENS": "9"}, min_prompt_tokens=8).min_prompt_tokens == 9
    # An empty value takes back what was set, where there is such a thing as none.
    for name in ("profile", "policy", "cpu_isa"):
        value, _, wanted = VALUES[name]
        assert getattr(load(**{name: value}), name) == wanted
        assert getattr(load({ENV_PREFIX + name.upper(): ""}, **{name: value}), name) is None
    # So one source of policies can be exchanged for the other.
    config = load(
        {ENV_PREFIX + "PROFILE": "", ENV_PREFIX + "POLICY": '{"selector":"sale"}'}, profile="a"
    )
    assert (config.profile, config.policy) == (None, Sale())


@pytest.mark.parametrize("nothing", [None, {}, {"other": {"a": 1}}, {SECTION: {}}])
def test_nothing_said_is_the_default(nothing: dict[str, Any] | None) -> None:
    assert load_config(nothing, {}) == SparseConfig()


def test_the_process_environment_is_read_unless_another_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENV_PREFIX + "MIN_QUERY_TOKENS", "7")
    assert load_config(None).min_query_tokens == 7
    assert load_config(None, {}).min_query_tokens == SparseConfig().min_query_tokens
    assert overrides_in()[ENV_PREFIX + "MIN_QUERY_TOKENS"] == "7"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_promt_tokens": 5}, "unknown field (did you mean 'min_prompt_tokens'?)"),
        ({"zzz": 5}, "zzz: unknown field (known: cpu_isa, dense_core, "),
        ({"min_prompt_tokens": "5"}, "min_prompt_tokens: input should be a valid integer, got '5'"),
        ({"min_prompt_tokens": 0}, "min_prompt_tokens: input should be greater than or equal to 1"),
        ({"min_query_tokens": 1.5}, "min_query_tokens: "),
        ({"enabled": 1}, "enabled: input should be a valid boolean, got 1"),
        ({"profile": ""}, "profile: "),
        ({"profile": 3}, "profile: input should be a valid string, got 3"),
        ({"cpu_isa": ""}, "cpu_isa: "),
        ({"policy": {"selector": "magic"}}, "policy: "),
        ({"policy": {"selector": "sale", "tau": float("nan")}}, "policy.sale.tau: "),
        ({"policy": {"selector": "sale", "tau": -0.1}}, "policy.sale.tau: "),
        ({"policy": {"selector": "static", "tau": 0.1}}, "policy.static.tau: unknown field"),
        ({"policy": {"selector": "sale", "tile": 48}}, "policy.sale.tile: "),
        ({"policy": "dense"}, "policy: "),
        ({"profile": "a", "policy": {"selector": "dense"}}, "want profile or policy, not both"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(**fields)
    assert str(caught.value).startswith("sparse_prefill configuration: ")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SparsePrefillError)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("MIN_PROMT_TOKENS", "5", "unknown field (did you mean 'MIN_PROMPT_TOKENS'?)"),
        ("QQQ", "5", "unknown field (known: CPU_ISA, "),
        ("MIN_PROMPT_TOKENS", "many", "valid integer"),
        ("MIN_PROMPT_TOKENS", "0", "greater than or equal to 1"),
        ("MIN_PROMPT_TOKENS", "", "valid integer"),
        ("ENABLED", "", "valid boolean"),
        ("ENABLED", "perhaps", "valid boolean"),
        ("POLICY", "{", "want JSON, got '{'"),
        ("POLICY", "dense", "want JSON, got 'dense'"),
    ],
)
def test_wrong_variables_are_named(variable: str, text: str, message: str) -> None:
    name = ENV_PREFIX + variable
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load({name: text})
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_a_policy_from_the_environment_is_checked() -> None:
    for text in ('{"selector": "sale", "tau": NaN}', '{"selector": "magic"}', "3", "null "):
        if text == "null ":
            assert load({ENV_PREFIX + "POLICY": text}).policy is None
            continue
        with pytest.raises(ConfigError, match=f"^{ENV_PREFIX}POLICY: "):
            load({ENV_PREFIX + "POLICY": text})


@pytest.mark.parametrize(
    "key", ["sparse-prefill", "SPARSE_PREFILL", "Sparse_Prefill", "sparseprefill"]
)
def test_a_misspelt_section_is_an_error(key: str) -> None:
    with pytest.raises(ConfigError, match=f"want the key 'sparse_prefill', got '{key}'"):
        load_config({key: {"enabled": False}}, {})


@pytest.mark.parametrize("section", [None, 3, "dense", ["enabled"]])
def test_a_section_that_is_no_object(section: object) -> None:
    with pytest.raises(ConfigError, match="want an object of fields, got"):
        load_config({SECTION: section}, {})


def test_what_is_set_for_the_build_does_not_trip_a_server() -> None:
    """VLLM_SPARSE_PREFILL_BUILD is setup.py's, and an image may well leave it set."""
    assert load({ENV_PREFIX + "BUILD": "require"}) == SparseConfig()


def test_a_command_that_measures_refuses_what_would_change_that() -> None:
    policy = {ENV_PREFIX + "POLICY": '{"selector": "static"}'}
    profile, least = {ENV_PREFIX + "PROFILE": "b.json"}, {ENV_PREFIX + "MIN_PROMPT_TOKENS": "9"}
    for section, environ in (
        (None, policy), (None, profile), (None, least),
        ({"policy": {"selector": "dense"}}, policy), ({"policy": {"selector": "dense"}}, profile),
        ({"profile": "a.json"}, profile), ({"min_prompt_tokens": 8}, least),
    ):  # fmt: skip
        ((variable, text),) = environ.items()
        with pytest.raises(ConfigError, match=f"^{variable}: want it unset, .*got {text!r}$"):
            refuse_overrides(section, environ)
    with pytest.raises(ConfigError, match=f"^{ENV_PREFIX}PROFIL: "):
        refuse_overrides({}, {ENV_PREFIX + "PROFIL": "b.json"})
    # What it left to a server's settings follows them, and an instruction set is no setting of it.
    refuse_overrides({"profile": "a.json"}, least)
    for nothing in ({}, {ENV_PREFIX + "CPU_ISA": "avx2"}, {ENV_PREFIX + "BUILD": "require"}):
        refuse_overrides(None, nothing)


def test_the_other_variables() -> None:
    assert allowed_plugins({}) is None
    assert allowed_plugins({"VLLM_PLUGINS": "a,sparse_prefill"}) == ["a", "sparse_prefill"]
    assert not prometheus_multiprocess({})
    assert prometheus_multiprocess({"PROMETHEUS_MULTIPROC_DIR": "/tmp"})
    assert session_directory({}) is None
    assert session_directory({"SPARSE_PREFILL_SESSION": "/x"}) == Path("/x")


def test_only_the_configuration_reads_the_environment() -> None:
    package = Path(__file__).parents[1] / "vllm_sparse_backend"
    readers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"os\.environ\b(?!\.get, )|os\.getenv", path.read_text())
    }
    # The build (which runs before anything is installed), vLLM's own registry of variables, an
    # engine in our own process, for which vLLM's are set, and the demo, which is a program by
    # itself that starts servers.
    allowed = {"config.py", "compat.py", "offline.py", "ops/cpu/build.py"}
    assert {r for r in readers if not r.startswith("demo/")} == allowed
