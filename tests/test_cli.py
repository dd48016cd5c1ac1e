"""The command `vllm-sparse`: what needs no model quickly, and doctor against a real vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_sparse_backend import __version__, doctor
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.profile import FORMAT, VERSION

TINY = {
    "architecture": "LlamaForCausalLM",
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}


def profile_text(**model: object) -> str:
    """A profile of the tiny Llama, with changes."""
    policies = {"0": {"*": {"selector": "dense"}}}
    return json.dumps(
        {"format": FORMAT, "version": VERSION, "model": TINY | model, "policies": policies}
    )


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`vllm-sparse` in a process of its own."""
    code = "from vllm_sparse_backend.cli import app; app()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)


def test_help_and_version_import_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from vllm_sparse_backend.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: print(sorted({'torch', 'vllm', 'triton'} & set(sys.modules)))"
    )
    for arguments, said in (["--help"], "doctor"), (["--version"], __version__):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        assert said in done.stdout
        assert done.stdout.rstrip().endswith("[]"), done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "no-model", "--text", "none.txt"],
        ["compare", "no-model", "--text", "none.txt"],
        ["fit-gates", "no-model", "--text", "none.txt"],
        ["inspect", "PROFILE", "--attention", "0", "0", "--text", "none.txt"],
        ["eval", "no-model", "--policy", '{"selector": "mass"}'],
        ["eval", "no-model", "--profile", "PROFILE"],
    ],
)
def test_what_measures_does_not_start_under_a_variable_that_overrides_it(
    arguments: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(profile_text())
    arguments = [str(path) if it == "PROFILE" else it for it in arguments]
    done = CliRunner().invoke(app, arguments, env={"VLLM_SPARSE_PREFILL_PROFILE": "b.json"})
    assert done.exit_code == 2
    assert done.stderr == (
        "error: VLLM_SPARSE_PREFILL_PROFILE: want it unset, as it would change what this command "
        "measures, got 'b.json'\n"
    )


def test_validate_says_what_a_profile_is_of(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(profile_text())
    done = CliRunner().invoke(app, ["validate", str(path)])
    assert done.exit_code == 0, done.output
    assert "valid: mine (sha256:" in done.output
    assert "2 layers of 4 heads; 1 entries" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), (profile_text(heads=3), "unknown field"), ("{}", "missing")],
)
def test_validate_refuses_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    done = CliRunner().invoke(app, ["validate", str(path)])
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1


def test_validate_says_what_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(profile_text())

    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    fits, does_not = (fresh("validate", str(path), "--model", str(m)) for m in (tiny_llama, other))
    assert fits.returncode == 0 and f"; fits {tiny_llama}" in fits.stdout, fits.stderr
    assert does_not.returncode == 1
    assert does_not.stderr.startswith("error: ") and does_not.stdout == ""
    assert "num_layers: the profile has 2, the model 3" in does_not.stderr


def test_doctor_wants_a_model_with_a_profile(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--profile", str(tmp_path / "p.json")])
    assert done.exit_code == 2
    assert "--model" in done.output


@pytest.mark.parametrize(
    ("pages", "asked", "advised"),
    [
        ("always [madvise] never", None, True),
        ("always [madvise] never", "0", True),
        ("always [madvise] never", "1", False),
        ("[always] madvise never", None, False),
        ("always madvise [never]", None, False),
        (None, None, False),
    ],
)
def test_doctor_advises_huge_pages_where_they_are_for_the_asking(
    pages: str | None,
    asked: str | None,
    advised: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if pages is not None:
        (tmp_path / "enabled").write_text(pages)
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if asked is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
    advice = doctor.examine().advice
    assert any("THP_MEM_ALLOC_ENABLE=1" in line for line in advice) is advised


def test_doctor_about_a_model_and_its_profile(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(profile_text())
    done = fresh("doctor", "--json", "--model", str(tiny_llama), "--profile", str(path))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["registered"] is True
    assert found["core"]["isas"][found["core"]["active"]] is True
    facts = dict(found["model"]["facts"])
    facts.pop("digest")
    assert facts == TINY
    assert [layer["path"] for layer in found["model"]["layers"]] == ["sparse", "sparse"]

    path.write_text(profile_text(num_heads=8))
    done = fresh("doctor", "--model", str(tiny_llama), "--profile", str(path))
    assert done.returncode == 1
    assert "num_heads: the profile has 8, the model 4" in done.stdout


def asked(model: Path, *options: str) -> dict[str, Any]:
    """What doctor says with these options of the server's."""
    done = CliRunner().invoke(app, ["doctor", "--json", "--model", str(model), "--", *options])
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == bool(found["problems"]), done.output
    return found


def of_policy(selector: str) -> str:
    return json.dumps({"sparse_prefill": {"policy": {"selector": selector}}})


def test_doctor_sees_what_the_server_is_started_with(tiny_llama: Path) -> None:
    for options, reason in (
        (["--port", "8001", "--max-num-batched-tokens", "2048"], None),
        (["--attention-backend", "SPARSE_PREFILL"], None),
        (["--kv-cache-dtype", "fp8"], "quantized_kv"),
        (["--additional-config", '{"sparse_prefill": {"enabled": false}}'], "switched_off"),
        (["--additional-config.sparse_prefill.enabled", "false"], "switched_off"),
        (["--hf-overrides", '{"attn_logit_softcapping": 30.0}'], "softcap"),
    ):
        found = asked(tiny_llama, *options)
        assert found["problems"] == [], options
        reasons = [layer["reason"] for layer in found["model"]["layers"]]
        assert reasons == [reason] * 2, options
    found = asked(tiny_llama, "--max-model-len", "1024")["model"]
    assert "every request will be computed dense: max_model_len is 1024" in str(found["warnings"])
    found = asked(tiny_llama, "--additional-config", of_policy("static"))["model"]
    assert "every head static" in found["profile"]


def test_doctor_says_what_vllm_or_we_say_to_the_options(tiny_llama: Path) -> None:
    for options, said in (
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--max-model-len", "long"], "--max-model-len"),
        (["another-model"], "want no model but that of --model"),
        (["--model", "another-model"], "want no model but that of --model"),
        (["--attention-backend", "CPU_ATTN"], "want the attention backend sparse_prefill, or none"),
        (["--attention-config.backend", "CPU_ATTN"], "want the attention backend sparse_prefill"),
        (["--additional-config", of_policy("statik")], "statik"),
        (["--additional-config", "[1]"], "additional-config"),
    ):
        (problem,) = asked(tiny_llama, *options)["problems"]
        assert said in problem, options
    twice = doctor.examine(
        str(tiny_llama), "one.json", ["--additional-config.sparse_prefill.profile", "other.json"]
    )
    assert twice.problems == ["--profile: want one, got one.json, and other.json in the options"]


def test_doctor_wants_a_model_with_options() -> None:
    done = CliRunner().invoke(app, ["doctor", "--", "--kv-cache-dtype", "fp8"])
    assert done.exit_code == 2
    assert "--model" in done.output
