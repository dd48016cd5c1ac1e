"""`vllm-sparse inspect`: the table, the JSON, the pictures; and one head's attention, from vLLM."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from _engine import environment
from _models import make_llama
from _report_records import FACTS, LENGTHS, POLICIES, measurement, profile, save_both
from rich.console import Console
from typer.testing import CliRunner

from vllm_sparse_backend.calibrate.results import measurement_of
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.ops import reference
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.report.attention import AttentionMap
from vllm_sparse_backend.report.attention_plot import attention_figure
from vllm_sparse_backend.report.capture import _tokens
from vllm_sparse_backend.report.heads import Inspection, inspect_profile
from vllm_sparse_backend.report.heads_plot import heads_figure
from vllm_sparse_backend.report.heads_table import by_threshold, colour, print_heads
from vllm_sparse_backend.report.measured import Found, densities, density_at, find
from vllm_sparse_backend.report.svg import inline
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static, label

RUNNER = CliRunner()
SCALE = 0.08  # with which random heads keep some tiles and skip others
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_both(tmp_path, profile())


def inspect(*arguments: str) -> Any:
    return RUNNER.invoke(app, ["inspect", *arguments], env=PLAIN)


def words(path: Path) -> str:
    return " ".join(ElementTree.parse(path).getroot().itertext())


def test_a_density_is_interpolated_in_the_length_s_logarithm_and_held_beyond() -> None:
    figures = measurement(profile()).heads[0].figures
    low, high = (figures[length].density for length in LENGTHS)
    assert density_at(figures, 2048) == pytest.approx(low)
    assert density_at(figures, 4096) == pytest.approx((low + high) / 2)  # 2048 * 4 = 8192
    assert density_at(figures, 1) == pytest.approx(low)
    assert density_at(figures, 1 << 20) == pytest.approx(high)


def test_json_has_policy_and_density_of_every_head(saved: Path) -> None:
    done = inspect(str(saved), "--json")
    assert done.exit_code == 0, done.output
    found = Inspection.model_validate_json(done.stdout)
    policies = [kind.policy for kind in found.kinds]
    assert [[policies[h.kind] for h in layer.heads] for layer in found.layers] == POLICIES
    assert (found.length, found.measurement) == (8192, "made-up.measurement.json")
    known = densities(measurement(profile()), 8192)
    for layer in found.layers:
        for head in layer.heads:
            # Layer 0 was not measured because it cannot be sparse.
            assert head.density == pytest.approx(known.get((layer.layer, head.head), 1.0))
    assert found.layers[0].density == 1.0
    assert not list(saved.parent.glob("*.svg"))  # no picture unless asked for


def test_the_table_has_a_row_a_layer_and_a_legend(saved: Path) -> None:
    done = inspect(str(saved), "-o", str(saved.parent / "p.svg"))
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("0 · · · · 1.000") for line in lines)
    assert any(line.startswith("1 m22 m22 s20 w20 ") for line in lines)  # densities
    assert "m mass, tau 0.01: 5 heads" in lines
    assert "w static, local 1024: 1 head" in lines
    assert "at 8,192 tokens" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[1:6])


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_head_is_lost_where_there_are_many(width: int) -> None:
    facts = ModelFacts(architecture="X", num_layers=1, num_heads=64, num_kv_heads=8, head_dim=128)
    many = Profile.build(facts, {0: {head: Mass(tau=0.001 * (head + 1)) for head in range(64)}})
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    print_heads(inspect_profile(many, Found(Path(), None, "none")), console)
    lines = [line.split() for line in out.getvalue().splitlines()]
    cells = "".join("".join(line) for line in lines[2 : 4 if width < 80 else 3])
    assert cells.count("m") == 64, out.getvalue()
    assert "m mass, tau 0.001 to 0.064: 64 heads" in out.getvalue()
    assert len(out.getvalue().splitlines()) < 10  # not one for each of the policies


def test_a_label_has_what_is_not_the_default() -> None:
    assert label(DENSE) == "dense"
    assert label(Mass()) == "mass, tau 0.005"
    assert label(Sale(tau=0.01, bits=8, tile=32)) == "sale, tau 0.01, tile 32, bits 8"
    assert label(Static(growth=0.1)) == "static, local 1024, growth 0.1"
    assert label(Mass(tau=0)) == "mass, tau 0 (keeps all)"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.unlink(), "no measurement beside the profile"),
        (
            lambda path: path.write_text(
                path.read_text().replace(profile().digest, "sha256:" + 64 * "0")
            ),
            "is of other policies than this profile's",
        ),
    ],
)
def test_without_a_measurement_of_its_own_only_policies_are_shown(
    saved: Path, change: Any, reason: str
) -> None:
    change(measurement_of(saved))
    done = inspect(str(saved), "-o", str(saved.parent / "p.svg"))
    assert done.exit_code == 0, done.output
    assert "Policies only" in done.stdout and reason in done.stdout
    assert "density" not in words(saved.parent / "p.svg")
    found = Inspection.model_validate_json(inspect(str(saved), "--json").stdout)
    assert found.density is None and reason in found.why_no_density


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture_is_of_the_kind_that_its_name_says(saved: Path, ending: str) -> None:
    target = saved.parent / f"heads.{ending}"
    done = inspect(str(saved), "-o", str(target))
    assert done.exit_code == 0, done.output
    if ending == "png":
        assert target.read_bytes().startswith(b"\x89PNG")
        return
    said = words(target)
    for wanted in ("policy", "density at 8,192 tokens", "mass, tau 0.01 (5)", "made-up"):
        assert wanted in said


def test_a_profile_s_name_is_text_and_no_path_or_markup(tmp_path: Path) -> None:
    evil = profile(name='../<script>alert("x")</script> $a$')
    evil.save(tmp_path / "p.json")
    code = "from vllm_sparse_backend.cli import app; app()"
    command = [sys.executable, "-c", code, "inspect", "p.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    (picture,) = tmp_path.glob("*.svg")
    assert str(picture.name) in done.stderr
    assert "<script" not in picture.read_text()
    assert evil.name in words(picture)


def test_a_picture_is_the_same_every_time_and_inlines() -> None:
    found = inspect_profile(profile(), Found(Path("x"), measurement(profile())))
    first, second = (inline(heads_figure(found), "heads", 'a "title"') for _ in range(2))
    assert first == second
    root = ElementTree.fromstring(first)
    assert root.attrib["aria-label"] == 'a "title"'
    assert "currentColor" in first and "<metadata" not in first


def test_colours_follow_density_or_the_threshold() -> None:
    assert colour(0.0) != colour(0.5) != colour(1.0)
    assert colour(-1) == colour(0) and colour(2) == colour(1)
    ordered: list[AnyPolicy] = [DENSE, Mass(tau=0.001), Mass(tau=0.05), Static()]
    shares = [by_threshold(policy) for policy in ordered]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.pdf"], "want a name ending in .svg or .png"),
        (["-o", "no/such/folder/x.svg"], "there is no folder"),
        (["--text", "x"], "--text: only with --attention"),
        (["--model", "x"], "--model: only with --attention"),
        (["--attention", "1", "2"], "want --text FILE as well"),
        (["--attention", "9", "2", "--text", "x"], "want a layer from 0 to 3, got 9"),
        (["--attention", "1", "9", "--text", "x"], "want a head from 0 to 3, got 9"),
        (["--attention", "1", "2", "--text", "x", "--model", "no/such/folder"], "--model"),
        (["--attention", "1", "2", "--text", "x", "--hf-overrides", "["], "--hf-overrides"),
    ],
)
def test_what_is_wrong_is_named(saved: Path, arguments: list[str], message: str) -> None:
    done = inspect(str(saved), *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_profile_or_measurement_is_named(saved: Path) -> None:
    assert "no/such.json" in inspect("no/such.json").stderr
    measurement_of(saved).write_text("{}")
    done = inspect(str(saved))
    assert done.exit_code == 2 and "made-up.measurement.json: name: missing" in done.stderr


def test_find_says_where_it_looked(saved: Path) -> None:
    assert find(profile(), saved).measurement == measurement(profile())
    assert find(profile(), saved.with_name("other.json")).measurement is None


@pytest.mark.parametrize(
    "policy", [Sale(tau=0.05, local=64, sink=16), Mass(tile=32, tau=0.13), DENSE]
)
def test_a_map_has_all_the_mass_and_what_is_missed(policy: AnyPolicy) -> None:
    torch.manual_seed(0)
    tokens, chunk = 700, 256
    q, k = torch.randn(tokens, 64), torch.randn(tokens, 64)
    found = AttentionMap("p", 0, 0, policy, "text", tokens, 0)
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        found.add(q[begin:end], k[:end], k[:end], SCALE)
    # By the definition, all at once.
    score = (SCALE * q @ k.T).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    mass = score.softmax(1)
    assert torch.allclose(found.mean_mass.sum(1), torch.ones(11), atol=1e-5)
    assert torch.allclose(found.mean_mass[3, 5], mass[192:256, 80:96].sum(1).mean(), atol=1e-6)
    assert torch.allclose(found.mean_mass[10, 1], mass[640:, 16:32].sum(1).mean(), atol=1e-6)
    missed = torch.zeros(tokens)
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        tiles = reference.select(
            q[begin:end, None], k[:end, None], [policy], SCALE, prompt_len=tokens
        )
        keep = tiles.mask(0).repeat_interleave(tiles.tile_sizes[0], 1)[:, :end]
        keep = keep.repeat_interleave(64, 0)[: end - begin]
        missed[begin:end] = (mass[begin:end, :end] * ~keep).sum(1)
    assert torch.allclose(found.missed, missed, atol=1e-5)
    summary = found.summary()
    assert summary.missed_worst == pytest.approx(float(missed.max()), abs=1e-5)
    assert (summary.density == 1.0) is (policy == DENSE)
    assert len(summary.missed_by_q_block) == 11


def test_rows_out_of_order_are_refused() -> None:
    found = AttentionMap("p", 0, 0, DENSE, "text", 128, 0)
    with pytest.raises(ValueError, match="want rows from position 0 on, got 64"):
        found.add(torch.randn(64, 64), torch.randn(128, 64), torch.randn(128, 64), 1.0)


def test_a_map_is_drawn_with_its_figures_and_cautions() -> None:
    found = AttentionMap("<p>", 3, 2, Mass(), "a $text$", 200, 2048)
    found.add(torch.randn(200, 64), torch.randn(200, 64), torch.randn(200, 64), 0.1)
    said = " ".join(ElementTree.fromstring(inline(attention_figure(found), "a", "b")).itertext())
    for wanted in (
        "<p>: layer 3, head 2: mass, tau 0.005", "200 tokens of a $text$", "mass missed, %",
        "it follows the policy from 2,048 tokens on", "kept: ", "skipped: ", "0.001%",
    ):  # fmt: skip
        assert wanted in said
    assert "never pays" in AttentionMap("p", 0, 0, Mass(), "t", 64, None).summary().caution()


def test_a_text_is_read_with_what_stands_in_front_of_every_prompt(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model, text = make_llama(tmp_path / "llama"), tmp_path / "text.txt"
    text.write_text("w5 w6 w7")
    assert _tokens(str(model), text, None) == [5, 6, 7]
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.backend_tokenizer.post_processor = template  # as of Gemma: <bos>, then the text
    tokenizer.save_pretrained(model)
    assert _tokens(str(model), text, None) == [1, 5, 6, 7]
    assert _tokens(str(model), text, 2) == [1, 5]
    with pytest.raises(Refused, match=r"--length 5: .*text.txt has 4 tokens"):
        _tokens(str(model), text, 5)
    text.write_text("")
    with pytest.raises(Refused, match="no text in it"):
        _tokens(str(model), text, None)


def test_attention_of_a_served_model_from_text_to_picture(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    facts = FACTS.model_copy(update={"num_layers": 2})
    tiny = Profile.build(facts, {1: {2: Static(local=512)}}, name="tiny")
    tiny.save(tmp_path / "tiny.json")
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + n * n % 500}" for n in range(3000)))
    code = "from vllm_sparse_backend.cli import app; app()"
    arguments = ["inspect", "tiny.json", "--attention", "1", "2", "--text", "text.txt", "--json"]
    arguments += ["--model", str(model), "--length", "2100", "-o", "map.svg", "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["tokens"] == 2100  # in two steps, since one has 2048
    assert len(summary["missed_by_q_block"]) == 33
    assert 0 < summary["density"] < 1
    assert 0 < summary["missed_mean"] < summary["missed_worst"] < 1
    assert "layer 1, head 2" in words(tmp_path / "map.svg")
