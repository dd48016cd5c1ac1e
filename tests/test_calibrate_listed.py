"""Calibration over list selectors: what is measured of their settings, and what heads get."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from _attention import make_qkv, needs_core
from _engine import environment
from _selectors import Everything, Nothing
from test_calibrate_command import command
from test_calibrate_rules import part as fused_part
from torch import get_num_threads, set_num_threads
from typer.testing import CliRunner

from vllm_sparse_backend.backend.observe import Call
from vllm_sparse_backend.calibrate.candidates import FUSED, LADDERS, Ladder, ladders_of
from vllm_sparse_backend.calibrate.command import _usable
from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.measure import LayerRecord
from vllm_sparse_backend.calibrate.parts import PartsFolder
from vllm_sparse_backend.calibrate.record import Recorder
from vllm_sparse_backend.calibrate.results import Measurement, measurement_of
from vllm_sparse_backend.calibrate.rules import Rule, choose
from vllm_sparse_backend.calibrate.run import Model, Wanted, _key
from vllm_sparse_backend.calibrate.sources import file_digest
from vllm_sparse_backend.calibrate.summary import choosing
from vllm_sparse_backend.calibrate.table import Group, Part, relative_cost, tabulate
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.ops import layout, reference
from vllm_sparse_backend.ops.tiles import q_blocks
from vllm_sparse_backend.options import Refused, parse_names
from vllm_sparse_backend.profile import ModelFacts, load_profile
from vllm_sparse_backend.selection import DENSE, ListSelector, Static, label
from vllm_sparse_backend.selection.s2 import Strided
from vllm_sparse_backend.selection.seer import Seer
from vllm_sparse_backend.target import Cpu, why_untimed

SETTINGS = (Strided(stride=2, local=64), Strided(stride=5, tile=64, local=64), Nothing(local=64))
LISTED = (*LADDERS, Ladder("listed", SETTINGS))
SECONDS = 300


def test_every_setting_is_measured_as_it_attends() -> None:
    q, k, v = make_qkv(5, 300, 1500, heads=4, kv_heads=2, dim=64, dtype=torch.float32)
    scale, number = 0.125, len(LADDERS)
    blocks = q_blocks(300, 1500)
    record = LayerRecord(4, LISTED, layer=1)
    record.add(q[:200], k[:1400], v[:1400], scale, q_blocks(200, 1400), 1500)
    record.add(q[200:], k, v, scale, q_blocks(100, 1500), 1500)
    sums = record.sums()
    assert [its.shape for its in sums.select] == [(3,)] and (sums.select[0] > 0).all()
    exact = reference.attend(q, k, v, reference.select(q, k, [DENSE] * 4, scale), scale)
    for setting, policy in enumerate(SETTINGS):
        tiles = reference.select(q, k, [policy] * 4, scale, v=v)
        missed = (reference.attend(q, k, v, tiles, scale) - exact).abs().sum((0, 2))
        found = torch.tensor(sums.error[number][:, :, setting].sum(1))
        torch.testing.assert_close(found, missed.double(), rtol=1e-3, atol=0.01)
    # The chunks meet within a q block, whose tiles both count.
    assert len(blocks) < len(q_blocks(200, 1400)) + len(q_blocks(100, 1500))
    kept = sums.kept[number].sum(1)  # [H, G]
    assert (kept[:, 2] < kept[:, 1]).all() and (kept[:, 1] < kept[:, 0]).all()
    assert (kept <= sums.causal.sum()).all()


def test_a_setting_that_keeps_all_is_exact() -> None:
    q, k, v = make_qkv(1, 64, 700, heads=2, kv_heads=1, dim=64, dtype=torch.float32)
    record = LayerRecord(2, (*LADDERS, Ladder("everything", (Everything(),))))
    record.add(q, k, v, 0.125, q_blocks(64, 700))
    sums = record.sums()
    np.testing.assert_allclose(sums.error[-1], 0, atol=1e-2)
    np.testing.assert_allclose(sums.mass[-1][..., 0], sums.rows[None].repeat(2, 0), rtol=1e-5)


def listed_part(seed: int, group: Group) -> Part:
    """As measured with the ladders of `LISTED`: three settings, at 0.1, 0.2, 0.4 of keeping all."""
    its = fused_part(seed, group)
    rng = np.random.default_rng(seed)
    down = np.sort(rng.random((*its.size.shape, 3)), 3)
    more = {
        "error": 100 * down**4 * 64, "square": down**8 * 640, "worst": 100 * down**2,
        "worst_size": np.full_like(down, 200.0), "mass": (1 - down / 3) * 640,
        "kept": (1 - down) * 64_000,
    }  # fmt: skip
    layers = len(its.size)
    return Part(
        its.group, its.octaves, its.size, its.rows, its.causal,
        **{name: [*getattr(its, name), x] for name, x in more.items()},
        select=[np.tile([0.2, 0.4, 0.8], (layers, 1))], keep_all=np.full(layers, 2.0), steps=4,
    )  # fmt: skip


def test_a_list_selectors_cost_is_measured() -> None:
    group = Group("text", 4096)
    table = tabulate([listed_part(0, group), listed_part(1, group)], LISTED)
    at = [i for i, its in enumerate(table.candidates) if isinstance(its.policy, ListSelector)]
    assert [table.candidates[i].policy for i in at] == list(SETTINGS)
    cost = relative_cost(table, Cpu("avx2"), 64)
    for i, share in zip(at, (0.1, 0.2, 0.4), strict=True):
        np.testing.assert_allclose(cost[i], table.density[i, 0] + share)
    assert (table.selection[: at[0]] == 0).all() and (table.selection[-1] == 0).all()
    # Beside it, the fused ones are what they are without.
    alone = tabulate([fused_part(0, group), fused_part(1, group)])
    np.testing.assert_array_equal(cost[: at[0]], relative_cost(alone, Cpu("avx2"), 64)[:-1])


@pytest.mark.parametrize("rule", list(Rule))
def test_heads_get_what_they_may(rule: Rule) -> None:
    table = tabulate([listed_part(0, Group("text", 4096))], LISTED)
    budget = {Rule.SALE: 50.0, Rule.MINFERENCE: 0.5}.get(rule, 1.0)
    for methods in (("listed", "sale"), ("sale",), ("sale", "static", "mass")):
        cost = relative_cost(table, Cpu("avx2"), 64, methods)
        choice = choose(table, cost, rule, budget, sensitivity=np.ones((2, 3)))
        ladders = {table.candidates[i].ladder for i in choice.flat} - {-1}
        assert {table.ladders[i].selector for i in ladders} <= set(methods)


def test_parts_keep_what_choosing_took(tmp_path: Path) -> None:
    folder, group = PartsFolder(tmp_path / "p.parts"), Group("text", 4096)
    its = listed_part(1, group)
    folder.save("text-4096-0", "key", its)
    again = folder.load("text-4096-0", "key", group)
    assert again is not None and again.keep_all is not None
    np.testing.assert_array_equal(again.select[0], its.select[0])
    np.testing.assert_array_equal(again.keep_all, its.keep_all)
    assert again.steps == its.steps == 4
    assert len(again.error) == len(LISTED)
    folder.save("text-4096-0", "key", fused_part(1, group))
    again = folder.load("text-4096-0", "key", group)
    assert again is not None and again.keep_all is None and list(again.select) == []


@needs_core
def test_choosing_is_told_of_the_steps_that_were_measured() -> None:
    length, chunk, group = 2560, 512, Group("text", 2560)
    q, k, v = make_qkv(1, length, length, heads=2, kv_heads=1)
    cache = layout.pack(k, v)
    table = torch.arange(len(cache), dtype=torch.int32)[None]
    starts = range(0, length, chunk)
    recorder = Recorder(group, SparseConfig(), starts, length, lambda: None, LISTED)
    for end in range(chunk, length + 1, chunk):  # two of five reach `min_prompt_tokens`
        at, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, chunk], [end]))
        recorder(Call(3, [0], q[end - chunk : end], cache, table, at, ends, 0.125, "vec"))
    part = recorder.part()
    assert part.steps == 2
    made = tabulate([part], LISTED)
    number = [its.policy for its in made.candidates].index(SETTINGS[0])
    took = choosing([part], made, np.full((1, 2), number))
    assert took == {label(SETTINGS[0]): pytest.approx(part.select[0][0, 0] / 2, abs=1e-5)}


def test_other_gates_or_threads_are_measured_anew(tmp_path: Path) -> None:
    facts = ModelFacts(
        architecture="LlamaForCausalLM", num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64
    )
    gates, document = tmp_path / "gates", Document(Group("text", 4096), 0, (1, 2, 3))

    def key(*more: Ladder) -> str:
        file_digest.cache_clear()
        wanted = Wanted(
            EngineOptions("model", 4096), "name", ("text",), (4096,), Rule.HEAD, 0.02, 1.0, 16, 0,
            tmp_path / "p.json", Cpu("avx2"), ladders=(*LADDERS, *more),
        )  # fmt: skip
        return _key(wanted, Model(facts, (0,)), document, "dense")

    seer, threads = Ladder("seer", (Seer(gates=str(gates)),)), get_num_threads()
    gates.write_bytes(b"first")
    fused, first = key(), key(seer)
    assert key(seer) == first != fused
    gates.write_bytes(b"refitted")
    assert key(seer) != first
    gates.write_bytes(b"first")
    try:
        set_num_threads(threads + 1)
        assert key(seer) != first and key() == fused, "no times are measured of fused ones"
    finally:
        set_num_threads(threads)


def test_what_they_take_is_measured_here_or_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_sparse_backend.target.here", lambda: "avx2")
    assert why_untimed("avx2") is None
    assert why_untimed("avx512") == (
        "the time that list selectors take is measured, and this machine is avx2, not avx512"
    )
    said = why_untimed("sm_90")
    assert said == "nothing is known of the time that list selectors take on sm_90"
    look = Model(
        ModelFacts(
            architecture="LlamaForCausalLM", num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64
        ),
        (0,),
    )
    with pytest.raises(Refused, match="--methods strided: nothing is known of the time"):
        _usable(parse_names("sale,strided", ["sale", "strided"]), look, "sm_90")
    usable, ladders = _usable(parse_names("all", ["sale", "strided"]), look, "sm_90")
    assert usable == ("sale",) and ladders == LADDERS


def test_ladders_are_the_fused_ones_and_those_named() -> None:
    assert ladders_of(FUSED) == ladders_of(()) == LADDERS
    made = ladders_of(("static", "strided"))
    assert made[:-1] == LADDERS and made[-1].settings == Strided.ladder()
    assert made[-1].listed and not made[0].listed


@needs_core
def test_a_profile_of_list_selectors(tiny_llama: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    words, output = tmp_path / "words.txt", tmp_path / "profile.json"
    words.write_text(" ".join(f"w{rng.randrange(3, 512)}" for _ in range(4500)))
    done = subprocess.run(
        command(tiny_llama, words, output, "--no-copies", "--methods", "strided,static",
                "--error", "1", "--blocks", "4", "--json"),
        env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    measurement = Measurement.model_validate_json(measurement_of(output).read_text())
    assert measurement.methods == ["strided", "static"]
    assert {its.selector for its in measurement.curves} >= {"sale", "mass"}
    profile = load_profile(output)
    assert {its.selector for its in profile.kinds()} <= {"strided", "static", "dense"}
    # As little as there is: the narrowest window, for which nothing is chosen.
    assert Static(local=256) in profile.kinds() and measurement.choosing == {}

    more = CliRunner().invoke(
        app,
        [*command(tiny_llama, words, output, "--no-copies", "--blocks", "4")[1:],
         "--methods", "strided", "--error", "1", "--json"],
    )  # fmt: skip
    assert more.exit_code == 0, more.output
    found = Measurement.model_validate(json.loads(measurement_of(output).read_text()))
    assert {head.policy.selector for head in found.heads} == {"strided"}
    assert "engine" not in more.output.lower(), "it was measured before"
    assert all(seconds > 0 for seconds in found.choosing.values()) and found.choosing
    before = output.read_bytes()
    again = CliRunner().invoke(
        app,
        [*command(tiny_llama, words, output, "--no-copies", "--blocks", "4")[1:],
         "--methods", "strided", "--error", "1", "--json"],
    )  # fmt: skip
    assert again.exit_code == 0 and output.read_bytes() == before, "times are kept, too"
    calibration = load_profile(output).calibration
    assert calibration is not None and calibration.note is not None
    assert "choosing tiles, measured, of a step and layer; strided" in calibration.note


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "hips"], "--methods: want all or some of sale, mass, static"),
        (["--rule", "sale", "--methods", "static"], "rule sale chooses thresholds of sale"),
        (["--rule", "sale", "--methods", "sale,strided"], "thresholds of sale; want sale alone"),
        (["--rule", "sale", "--methods", "all"], "thresholds of sale; want sale alone"),
    ],
)
def test_wrong_methods_are_named(
    tiny_llama: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    given = [str(tiny_llama), "--text", str(tmp_path), "-o", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, ["calibrate", *given, *arguments])
    assert result.exit_code == 2 and said in result.output.replace("\n", " "), result.output
