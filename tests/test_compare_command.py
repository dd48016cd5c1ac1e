"""`vllm-sparse compare`: from the text to the page, interrupted and taken up again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from _attention import needs_core
from _engine import environment
from _selectors import forget, install
from pydantic import Field
from test_report import _Page
from typer.testing import CliRunner

from vllm_sparse_backend.calibrate.candidates import FUSED, LADDERS
from vllm_sparse_backend.calibrate.command import _usable as calibrations_usable
from vllm_sparse_backend.calibrate.run import Model
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.compare.conduct import layers_of
from vllm_sparse_backend.compare.methods import PAPER, SALE_PAPER, choose, fused, names
from vllm_sparse_backend.compare.results import Comparison
from vllm_sparse_backend.compare.run import rehearse_all
from vllm_sparse_backend.compare.store import CAPTURED, POINTS
from vllm_sparse_backend.options import Refused, parse_names
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.selection import (
    DENSE,
    UNIFORM_DEFAULT,
    AnyPolicy,
    ListSelector,
    Mass,
    Sale,
    label,
    registry,
)
from vllm_sparse_backend.selection.s2 import Strided
from vllm_sparse_backend.selection.seer import Seer
from vllm_sparse_backend.selection.view import View
from vllm_sparse_backend.target import here

LENGTH = 2304
SECONDS = 300
ALWAYS = {"dense", UNIFORM_DEFAULT.selector, PAPER}

pytestmark = needs_core


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{rng.randrange(3, 512)}" for _ in range(5000)))
    return path


def command(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("vllm-sparse")), "compare", str(model),
        "--text", str(text), "--lengths", str(LENGTH), "--methods", "strided", "-o", str(output),
        "--chunk-tokens", "1024", "--repeats", "2", "--layers", "all", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(
    tiny_llama: Path, words: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, set[Path], subprocess.CompletedProcess[str]]:
    """Killed when the first settings were measured, and finished by the same command."""
    output = tmp_path_factory.mktemp("compared") / "page.html"
    arguments = command(
        tiny_llama, words, output, "--end-to-end", "1", "--documents", "1", "--tasks", "text"
    )
    points = output.with_suffix(".parts") / POINTS
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + SECONDS
    while len(list(points.glob("*.json"))) < 3:
        assert process.poll() is None, "it ended before anything was measured"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = set(points.glob("*.json"))
    times = {path: path.stat().st_mtime_ns for path in kept}
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same = {path for path, when in times.items() if path.stat().st_mtime_ns == when}
    assert same == kept, "what was measured before it was killed is measured once"
    return output, kept, done


def test_every_setting_of_every_method_is_measured(
    compared: tuple[Path, set[Path], subprocess.CompletedProcess[str]],
) -> None:
    output, kept, done = compared
    found = Comparison.model_validate_json(output.with_suffix(".json").read_text())
    assert {its.name for its in found.methods} == ALWAYS | {"strided"}
    assert found.dense == "CPU_ATTN" and found.threads == 1 and found.layers == [0, 1]
    strided = found.method("strided")
    assert [its.policy for its in strided.points] == list(Strided.ladder())
    assert strided.listed and not found.method("dense").listed
    for method in found.methods:
        for point in method.points:
            assert 0 <= point.select < point.time and point.seconds > 0
            assert 0 < point.density <= 1 and 0 <= point.error < 2 and 0 < point.recall <= 1.001
    kept_all = found.point("dense", LENGTH)
    assert kept_all is not None and kept_all.error < 0.01 and kept_all.density == 1
    densities = [point.density for point in strided.points]
    assert densities == sorted(densities, reverse=True)
    assert found.point(found.default, LENGTH) is not None
    assert len(kept) < len(list((output.with_suffix(".parts") / POINTS).glob("*.json")))
    assert "strided" in done.stdout and f"At {LENGTH:,} tokens the default (" in done.stdout


def test_perplexities_are_of_the_settings_nearest_the_error(
    compared: tuple[Path, set[Path], subprocess.CompletedProcess[str]],
) -> None:
    found = Comparison.model_validate_json(compared[0].with_suffix(".json").read_text())
    of = {method.name: method.perplexities for method in found.methods}
    assert of["dense"] == []
    assert len(of["strided"]) == 1 and of["strided"][0].task == "text"
    evaluated = {its.setting for rows in of.values() for its in rows}
    assert {found.default, label(SALE_PAPER)} <= evaluated
    for rows in of.values():
        for its in rows:
            assert its.dense > 1 and its.sparse > 1 and its.tokens > 1000
            assert its.density is not None and 0 < its.density <= 1


def test_the_page_is_whole(
    compared: tuple[Path, set[Path], subprocess.CompletedProcess[str]],
) -> None:
    page = _Page(compared[0].read_text())
    assert page.seen["svg"] == 2 and "script" not in page.seen
    for said in (f"At {LENGTH:,} tokens the default", "strided", "Of the blocks of 64 keys those"):
        assert said in page.text, said


def test_a_finished_comparison_is_told_again_without_an_engine(
    compared: tuple[Path, set[Path], subprocess.CompletedProcess[str]],
    tiny_llama: Path,
    words: Path,
) -> None:
    output = compared[0]
    before = Comparison.model_validate_json(output.with_suffix(".json").read_text())
    arguments = command(tiny_llama, words, output, "--error", "0.1", "--markdown")[1:]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("| method | setting, 2,304 tokens |") and "0.1" in done.stdout
    again = Comparison.model_validate_json(output.with_suffix(".json").read_text())
    assert [its.points for its in again.methods] == [its.points for its in before.methods]
    assert again.errors == [0.1]
    assert list((output.with_suffix(".parts") / CAPTURED).glob("*.safetensors"))


def test_what_was_disturbed_is_measured_again(
    compared: tuple[Path, set[Path], subprocess.CompletedProcess[str]],
    tiny_llama: Path,
    words: Path,
) -> None:
    """As if the machine had stood still for seconds, once, beside dense attention."""
    output = compared[0]
    path = next((output.with_suffix(".parts") / POINTS).glob("*-strided-*.json"))
    kept = json.loads(path.read_text())
    kept["record"]["dense"] = [seconds + 5 for seconds in kept["record"]["dense"]]
    path.write_text(json.dumps(kept))
    done = CliRunner().invoke(app, command(tiny_llama, words, output)[1:])
    assert done.exit_code == 0, done.output
    assert max(json.loads(path.read_text())["record"]["dense"]) < 1
    found = Comparison.model_validate_json(output.with_suffix(".json").read_text())
    assert found.disturbed == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "1024"], "want at least 2304"),
        (["--lengths", "16384"], "the model has 8192 positions, got 16384"),
        (["--lengths", "8192"], "words.txt: want 8191 tokens"),
        (["--text", "nowhere"], "text nowhere: No such file or directory"),
        (["--methods", "strided,hips"], "--methods: want all or some of dense, sale"),
        (["--layers", "0,2"], "want some of the layers that can be sparse, 0, 1; got 2"),
        (["--layers", "x"], "--layers: want all, or numbers with commas between, got 'x'"),
        (["--error", "0"], "--error: want numbers above 0 and up to 1"),
        (["--error", "0.1;0.2"], "--error: want numbers above 0 and up to 1"),
        (["--policy", '{"selector": "sale", "tua": 1}'], "unknown field"),
        (["--policy", "[]"], "--policy: want a JSON object"),
        (["--tasks", "needles"], "--tasks: want some of text, copy, got 'needles'"),
        (["--tasks", "text"], "--tasks: want --end-to-end with it"),
        (["--documents", "2"], "--documents: want --end-to-end with it"),
        (["--end-to-end-length", "4096"], "--end-to-end-length: want --end-to-end with it"),
        (["--end-to-end", "1", "--end-to-end-length", "16384"], "has 8192 positions"),
        (["--end-to-end", "1", "--documents", "9"], "words.txt: want"),
        (["-o", "page.pdf"], "-o page.pdf: want a name ending in .html"),
        (["-o", "no/such/page.html"], "-o no/such/page.html: there is no folder no/such"),
        (["--json", "--markdown"], "--json, --markdown: want one of them"),
        (["--profile", "none.json"], "none.json"),
        (["--hf-overrides", "[]"], "--hf-overrides: want a JSON object"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(
    tiny_llama: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(tiny_llama), "--text", str(words), "--lengths", str(LENGTH)]
    result = CliRunner().invoke(app, ["compare", *given, *arguments])
    assert result.exit_code == 2, result.output
    assert said in result.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_help_teaches() -> None:
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    text = CliRunner().invoke(app, ["compare", "--help"], env=plain).output
    for part in ("--methods", "--end-to-end", "--layers", "vllm-sparse compare ./model", ".parts",
                 "Examples:", "Exit status:"):  # fmt: skip
        assert part in text, part


def test_layers_are_every_sixth_unless_named() -> None:
    assert layers_of(None, range(30)) == (2, 8, 14, 20, 26)
    assert layers_of(None, (5, 11, 17)) == (17,)
    assert layers_of(None, (3,)) == (3,)
    assert layers_of("all", (3, 5)) == (3, 5)
    assert layers_of("5,3,5", (3, 5)) == (3, 5)


# Which methods


def test_whatever_is_known_is_compared() -> None:
    assert {method.name for method in choose("all").methods} | set(choose("all").left_out) == {
        *(method.name for method in fused()),
        *registry.known(),
    }
    assert names()[:3] == ["dense", "sale", "sale-paper"]


def test_what_all_is_compared_with_is_always_there() -> None:
    found = {method.name: method for method in choose("strided,-sale,-dense").methods}
    assert set(found) == ALWAYS | {"strided"}
    assert [its.policy for its in found[PAPER].settings] == [SALE_PAPER]
    policies = [its.policy for its in found[UNIFORM_DEFAULT.selector].settings]
    assert UNIFORM_DEFAULT in policies and found[UNIFORM_DEFAULT.selector].own
    assert "strided" not in {its.name for its in choose("all,-strided").methods}


def test_a_policy_joins_its_ladder_or_is_a_method_of_its_own() -> None:
    asked: list[AnyPolicy] = [
        Sale(tau=0.003), Sale(tau=0.003, local=768), Sale(tau=0.006, local=768), Mass(tau=0.005),
        Strided(stride=5), Strided(stride=2),
    ]  # fmt: skip
    found = {method.name: method for method in choose("mass,strided", asked).methods}
    assert set(found) == ALWAYS | {"mass", "strided", "sale, local 768"}
    assert Sale(tau=0.003) in [its.policy for its in found["sale"].settings]
    assert [its.policy for its in found["sale, local 768"].settings] == asked[1:3]
    strides = [its.policy.stride for its in found["strided"].settings]  # type: ignore[union-attr]
    assert sorted(strides) == sorted({5, *(its.stride for its in Strided.ladder())})
    assert len(found["mass"].settings) == len(choose("mass").methods[3].settings)
    # A wider window is not somebody else's rule; every row scored is SALE's.
    assert found["sale, local 768"].own
    theirs = choose("sale", [SALE_PAPER.model_copy(update={"sink": 16})]).methods[-1]
    assert "sink 16" in theirs.name and not theirs.own


def test_a_policy_without_its_main_parameter_is_a_ladder() -> None:
    asked: list[AnyPolicy] = [Sale(local=768), Seer(gates="mine.safetensors"), Strided()]
    found = {method.name: method for method in choose("strided", asked).methods}
    assert set(found) == ALWAYS | {"strided", "sale, local 768", "seer, gates mine.safetensors"}
    wide = [its.policy for its in found["sale, local 768"].settings]
    assert wide == [
        its.policy.model_copy(update={"local": 768}) for its in choose("sale").methods[1].settings
        if its.policy
    ]  # fmt: skip
    seer = [its.policy for its in found["seer, gates mine.safetensors"].settings]
    assert [its.threshold for its in seer] == [its.threshold for its in Seer.ladder()]  # type: ignore[union-attr]
    assert len(found["strided"].settings) == len(Strided.ladder())


FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)


def test_what_misses_a_file_is_left_out_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = choose("all")
    rehearse_all(found, FACTS, (0, 1))
    assert {method.name for method in found.methods} >= {*registry.known()} - {"seer"}
    assert list(found.left_out) == ["seer"] and "gates.safetensors" in found.left_out["seer"]
    with pytest.raises(Refused, match=r"--methods seer: gates gates\.safetensors"):
        rehearse_all(choose("seer"), FACTS, (0, 1))
    with pytest.raises(Refused, match=r"seer, gates mine\.safetensors: gates mine"):
        rehearse_all(choose("strided", [Seer(gates="mine.safetensors")]), FACTS, (0, 1))
    known = [*FUSED, *registry.known()]
    with pytest.raises(Refused, match="--methods seer: gates gates"):
        calibrations_usable(parse_names("seer", known), Model(FACTS, (0, 1)), here())
    usable, ladders = calibrations_usable(parse_names("all", known), Model(FACTS, (0, 1)), here())
    assert set(usable) == {*FUSED, *registry.known()} - {"seer"}
    assert ladders[: len(LADDERS)] == LADDERS
    assert [ladder.selector for ladder in ladders[len(LADDERS) :]] == list(usable[len(FUSED) :])


def test_a_profile_is_a_method() -> None:
    from _report_records import profile

    made: Profile = profile()
    method = choose("strided", profiles=[made]).methods[-1]
    (setting,) = method.settings
    assert (method.name, setting.policy) == ("profile made-up", None)
    assert setting.rows(2, 4) == made.for_layer(2)
    assert setting.identity(0, 4) != setting.identity(1, 4)
    assert setting.kinds() == made.kinds() and DENSE in setting.kinds()


class WantsFile(ListSelector):
    """Wants a file, without which it has no settings."""

    selector: Literal["wants_file"] = "wants_file"
    main_parameter: ClassVar[str] = "tau"
    gates: str = Field(min_length=1)
    tau: float = 0.1

    @classmethod
    def ladder(cls) -> tuple[WantsFile, ...]:
        return (cls(),)  # type: ignore[call-arg]

    def keep(self, view: View) -> torch.Tensor:
        return torch.ones(len(view.heads), len(view.blocks), view.num_tiles, dtype=torch.bool)


def test_a_selector_without_settings_is_left_out_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "wants-file", {"wants_file": "test_compare_command:WantsFile"})
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    try:
        found = choose("all")
        assert "wants_file" not in {method.name for method in found.methods}
        assert found.left_out == {"wants_file": "no settings of its own (gates: missing)"}
        with pytest.raises(Refused, match=r"--methods wants_file: no settings of its own"):
            choose("wants_file")
        given = choose("all", [WantsFile(gates="a"), WantsFile(gates="a", tau=0.2)])
        method = next(its for its in given.methods if its.listed and "wants_file" in its.name)
        assert method.name == "wants_file, gates a" and len(method.settings) == 2
        assert given.left_out == {}
    finally:
        monkeypatch.undo()
        forget()


def test_the_json_says_what_the_options_were(
    compared: tuple[Path, set[Path], subprocess.CompletedProcess[str]],
) -> None:
    data = json.loads(compared[0].with_suffix(".json").read_text())
    assert (data["comparison_schema"], data["chunk_tokens"], data["repeats"]) == (1, 1024, 2)
    assert data["lengths"] == [LENGTH] and str(LENGTH) in data["dense_seconds"]
