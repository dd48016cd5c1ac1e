"""What is measured of a setting is what the op does: errors, tiles, times, under every chunk."""

from __future__ import annotations

import dataclasses
import itertools
from importlib import import_module
from pathlib import Path

import pytest
import torch
from _attention import make_qkv, needs_core
from _selectors import Everything, Nothing

from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.run import Model
from vllm_sparse_backend.calibrate.sources import file_digest, made_of, source_digest
from vllm_sparse_backend.calibrate.table import Group
from vllm_sparse_backend.compare.layer import Layer
from vllm_sparse_backend.compare.measure import CPU_ATTN, Bench, How, Measured
from vllm_sparse_backend.compare.methods import Method, Setting
from vllm_sparse_backend.compare.ours import Ours
from vllm_sparse_backend.compare.rounds import SECONDS, spoiled, usual
from vllm_sparse_backend.compare.run import Wanted, _cell, point_of
from vllm_sparse_backend.compare.store import CAPTURED, POINTS, Store
from vllm_sparse_backend.compare.truth import Judged, Truth, figures
from vllm_sparse_backend.compat_attention import PAGE, CpuAttention, why_no_cpu_attention
from vllm_sparse_backend.errors import SelectorError, SparsePrefillError
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.ops import PolicyTable, layout, reference
from vllm_sparse_backend.ops.tiles import q_blocks
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import DENSE, Sale, Static
from vllm_sparse_backend.selection.seer import Seer

LENGTH, CHUNK = 3000, 1024
ENDS = [1024, 2048, 3000]
HOW = How(repeats=2, blocks=4, seed=0)

pytestmark = needs_core


@pytest.fixture(scope="module")
def layer() -> Layer:
    q, k, v = make_qkv(1, LENGTH, LENGTH, heads=4, kv_heads=2, dim=64)
    return Layer(q * 2, k, v)


@pytest.fixture(scope="module")
def bench(layer: Layer) -> Bench:
    return Bench(layer, 0, ENDS, HOW)


def test_a_step_is_the_rows_and_the_keys_they_see(layer: Layer) -> None:
    step = layer.step(1024, 2048)
    assert (len(step.q), len(step.k), step.offset, step.prompt_len) == (1024, 2048, 1024, LENGTH)
    assert torch.equal(step.q, layer.q[1024:2048]) and torch.equal(step.v, layer.v[:2048])
    assert step.softmax_scale == 64**-0.5 and step.group == 2


def test_truth_is_exact_attention(layer: Layer) -> None:
    step = layer.step(1000, 1500)  # blocks in part at both ends
    blocks = q_blocks(500, 1500)
    truth = Truth(step, [blocks[0], blocks[3], blocks[-1]])
    policy = Static(sink=16, local=64)
    tiles = reference.select(step.q, step.k, [policy] * 4, 64**-0.5)
    q, k, v = (x.float() for x in (step.q, step.k, step.v))
    exact = reference.attend(q, k, v, reference.select(q, k, [DENSE] * 4, 64**-0.5), 64**-0.5)
    out = reference.attend(q, k, v, tiles, 64**-0.5)
    subtiles = torch.stack([tiles.mask(head) for head in range(4)])
    judged = truth.judge(out, subtiles)
    rows = torch.cat([torch.arange(b.first - 1000, b.end - 1000) for b in truth.blocks])
    missed = (out[rows] - exact[rows]).abs().sum(2)
    torch.testing.assert_close(judged.missed, missed.flatten(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        judged.size, exact[rows].abs().sum(2).flatten(), rtol=1e-4, atol=1e-4
    )
    weights = torch.stack([truth.weights(head, 1000, 1024) for head in range(4)], 1)  # [R, H, S]
    kept = subtiles[:, 0].repeat_interleave(16, 1)[:, :1024]
    mass = (weights * kept).sum(2)  # [R, H]
    torch.testing.assert_close(judged.mass[: mass.numel()], mass.flatten(), rtol=1e-4, atol=1e-4)
    all_kept = truth.judge(exact, None)
    assert all_kept.mass.eq(1).all() and float(all_kept.missed.max()) < 1e-3
    assert 0 < truth.oracle_density(64, 0.98) <= 1


def test_figures_are_of_all_rows_together() -> None:
    missed = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0])
    size = torch.tensor([10.0, 10.0, 10.0]), torch.tensor([70.0])
    mass = torch.tensor([0.9, 1.0, 0.5]), torch.tensor([1.0])
    found = figures([Judged(*its) for its in zip(missed, size, mass, strict=True)])
    assert found.error == pytest.approx(0.04)
    assert found.tail == pytest.approx(0.3), "the worst row of four"
    assert (found.recall, found.worst_recall) == pytest.approx((0.85, 0.5))


@pytest.mark.skipif(why_no_cpu_attention() is not None, reason=str(why_no_cpu_attention()))
def test_dense_is_vllms_own_kernel_over_a_cache_that_ours_reads(layer: Layer) -> None:
    base = CpuAttention(layer.k, layer.v)
    assert torch.equal(base.kv_cache, layout.pack(layer.k, layer.v, base.kv_layout, PAGE))
    step = layer.step(2048, 3000)
    out = torch.full_like(step.q, torch.nan)
    base(step.q, 3000, step.softmax_scale, out)
    table = PolicyTable([DENSE] * 4)
    ours = Ours(step, table, base.kv_cache, base.kv_layout)()
    torch.testing.assert_close(out.float(), ours.float(), rtol=0.02, atol=0.02)


def test_a_round_measures_what_the_op_does(layer: Layer, bench: Bench) -> None:
    settings = [
        Setting(it) for it in (DENSE, Sale(tau=0.02), Static(local=512), Everything(), Nothing())
    ]
    dense, sale, static, everything, nothing = bench.round(settings)
    assert dense.base == bench.dense == CPU_ATTN
    for its in (dense, sale, static, everything, nothing):
        assert len(its.seconds) == len(its.dense) == len(its.select) == HOW.repeats
        assert all(0 <= a <= b for a, b in zip(its.select, its.seconds, strict=True))
        assert its.dense == dense.dense, "dense attention's of the same round"
    assert dense.error < 0.01 and dense.recall == pytest.approx(1, abs=1e-5)
    assert dense.computed == dense.causal == everything.computed
    assert everything.error == pytest.approx(dense.error, abs=1e-3)
    assert nothing.computed < static.computed < dense.computed
    assert nothing.computed < sale.computed < dense.computed
    assert dense.error < sale.error < nothing.error
    assert sale.error <= sale.tail and sale.worst_recall <= sale.recall < 1
    assert min(everything.select) > 0 and max(static.select) < max(sale.select)


def test_a_server_follows_no_policy_in_short_contexts(layer: Layer, bench: Bench) -> None:
    (nothing,) = bench.round([Setting(Nothing(local=0, sink=16))])
    # Up to 2048 tokens, `min_prompt_tokens`, everything is computed.
    whole = sum(-(-b.end // 16) * 16 for b in q_blocks(1024, 1024)) * 4
    assert nothing.computed >= whole
    table = PolicyTable([Nothing(local=0, sink=16)] * 4)
    step = layer.step(2048, 3000)
    cache = layout.pack(layer.k, layer.v, "vec", PAGE)
    _, subtiles = Ours(step, table, cache, "vec").with_tiles()
    kept = int(subtiles.sum()) * 16
    between = layer.step(1024, 2048)
    _, more = Ours(between, table, cache, "vec").with_tiles()
    assert nothing.computed == whole + kept + int(more.sum()) * 16


def test_the_same_blocks_are_judged_in_every_layer(bench: Bench, layer: Layer) -> None:
    other = Bench(layer, 5, ENDS, HOW)
    steps = [layer.step(start, end) for start, end in itertools.pairwise([0, *ENDS])]
    chosen = [bench._sampled(step) for step in steps]
    assert chosen == [other._sampled(step) for step in steps]
    assert sum(map(len, chosen)) == HOW.blocks and chosen[-1][-1].end == LENGTH


def test_a_step_may_have_no_block_to_judge(layer: Layer, bench: Bench) -> None:
    few = Bench(layer, 0, ENDS, dataclasses.replace(HOW, blocks=1))
    (its,), (more,) = few.round([Setting(Static(local=256))]), bench.round([Setting(DENSE)])
    assert its.causal == more.causal and its.error > 0 and min(its.seconds) > 0


def test_a_point_is_the_sum_of_its_layers(bench: Bench) -> None:
    setting = Setting(Sale(tau=0.02))
    (one,) = bench.round([setting])
    slow = one.model_copy(
        update={
            "seconds": [3.0, 1.0, 2.0], "dense": [4.0, 2.0, 3.0], "select": [1.0, 0.5, 0.25],
            "error": 0.1, "computed": 10, "causal": 100,
        }
    )  # fmt: skip
    fast = slow.model_copy(
        update={"seconds": [1.0, 1.0, 1.0], "dense": [7.0, 7.0, 7.0], "error": 0.3, "computed": 30}
    )
    point = point_of(setting, 4096, [slow, fast], dense_seconds=20.0)
    assert (point.time, point.select) == pytest.approx((0.3, 0.1))
    assert (point.seconds, point.select_seconds) == pytest.approx((6.0, 2.0))
    assert (point.error, point.density) == pytest.approx((0.2, 0.2))
    turns = [4 / 11, 2 / 9, 3 / 10]
    assert point.spread == pytest.approx((turns[0] - turns[1]) / turns[2])


def test_what_was_disturbed_is_known_by_dense_attentions_time(bench: Bench) -> None:
    (its,) = bench.round([Setting(DENSE)])

    def beside(*dense: float) -> Measured:
        return its.model_copy(update={"dense": list(dense)})

    # Two settings of one round, and three more rounds.
    found = {
        "a": beside(1.0, 1.1, 9.0), "b": beside(1.0, 1.1, 9.0), "c": beside(1.2, 1.0, 1.3),
        "d": beside(3.0, 3.3, 1.0), "e": beside(0.9, 0.9, 0.9),
    }  # fmt: skip
    assert usual(found) == pytest.approx((1.1 + 1.2) / 2)
    assert spoiled(found) == {"d": pytest.approx(3.0 / 1.15)}
    short = {"a": beside(0.01), "b": beside(0.011), "c": beside(0.01 + SECONDS)}
    assert spoiled(short) == {} and spoiled({}) == {}
    assert set(spoiled({**short, "c": beside(0.02 + SECONDS)})) == {"c"}


def test_what_was_read_comes_back_in_its_chunks(tmp_path: Path, layer: Layer) -> None:
    store = Store(tmp_path / "c.parts")
    for start, end in zip([0, *ENDS], ENDS, strict=False):
        rows = slice(start, end)
        store.save_chunk("text-0", start, Layer(layer.q[rows], layer.k[rows], layer.v[rows]))
    assert not store.has_layer("text-0", "key")
    store.close_layer("text-0", "key", [0, *ENDS[:-1]], 0.125)
    assert store.has_layer("text-0", "key") and not store.has_layer("text-0", "another")
    again, ends = store.layer("text-0", "key")
    assert ends == ENDS and again.scale == 0.125
    for name in "qkv":
        assert torch.equal(getattr(again, name), getattr(layer, name))
    (store.folder / CAPTURED / "text-0-1024.safetensors").write_bytes(b"cut off")
    with pytest.raises(SparsePrefillError, match=r"captured: cannot be read .* delete it"):
        store.layer("text-0", "key")


def test_what_is_being_read_anew_does_not_count_as_read(tmp_path: Path, layer: Layer) -> None:
    store = Store(tmp_path / "c.parts")
    store.save_chunk("text-0", 0, layer)
    store.close_layer("text-0", "first", [0], 0.125)
    store.save_chunk("text-0", 0, layer)  # of another text, which is then interrupted
    assert not store.has_layer("text-0", "first")


def test_a_record_counts_under_its_key_alone(tmp_path: Path, bench: Bench) -> None:
    store = Store(tmp_path / "c.parts")
    (its,) = bench.round([Setting(DENSE)])
    assert store.load(POINTS, "a", "key", Measured) is None
    store.save(POINTS, "a", "key", its)
    assert store.load(POINTS, "a", "key", Measured) == its
    assert store.load(POINTS, "a", "another", Measured) is None
    path = store.folder / POINTS / "a.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert store.load(POINTS, "a", "key", Measured) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsePrefillError, match="cannot be written"):
        Store(tmp_path / "file").save(POINTS, "a", "key", its)


def test_a_changed_selector_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "from typing import Literal\n"
        "from vllm_sparse_backend.selection import ListSelector\n"
        "class Mine(ListSelector):\n"
        '    selector: Literal["mine"] = "mine"\n'
        "    def keep(self, view): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "digest_mine.py").write_text(body)
    mine = import_module("digest_mine").Mine
    before = source_digest(mine)
    source_digest.cache_clear()
    assert source_digest(mine) == before
    (tmp_path / "digest_mine.py").write_text(body + "# changed\n")
    source_digest.cache_clear()
    assert source_digest(mine) != before
    assert source_digest(Sale) == ""


def test_what_has_other_gates_is_measured_anew(tmp_path: Path) -> None:
    gates = tmp_path / "gates.safetensors"
    method = Method("seer", "", (Setting(Seer(gates=str(gates))), Setting(Sale())))
    facts = ModelFacts(
        architecture="LlamaForCausalLM", num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64
    )
    document = Document(Group("text", LENGTH), 0, (1, 2, 3))
    wanted = Wanted(
        EngineOptions("model", LENGTH), Model(facts, (0,)), (0,), (document,), (method,), HOW, 1
    )
    found = []
    for content in (b"first", b"refitted", b"first"):
        gates.write_bytes(content)
        file_digest.cache_clear()
        found.append([job.key for job in _cell(wanted, document, 0).jobs["seer"]])
    (first, sale), (refitted, again), (same, _) = found
    assert first == same != refitted and sale == again
    with pytest.raises(SelectorError, match="none: No such file"):
        made_of([Seer(gates=str(tmp_path / "none"))])
