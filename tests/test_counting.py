"""What workers count of each layer and head, against what the op computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _attention import needs_core

from vllm_sparse_backend.backend.plan import make_plan
from vllm_sparse_backend.backend.start import Setup
from vllm_sparse_backend.backend.worker import Worker
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.metrics import Totals, counters, read_totals
from vllm_sparse_backend.ops import AttentionStats, PolicyTable, sparse_attention
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.ops.tiles import total_causal_tiles
from vllm_sparse_backend.profile import Calibration, ModelFacts, Profile
from vllm_sparse_backend.selection import Dense, Policy, Sale, Static

pytestmark = needs_core

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64
)
POLICIES: list[Policy] = [Dense(), Static(local=64, tile=32), Sale(tau=0.5, tile=64), Static()]
LAYER = "model.layers.1.self_attn.attn"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("vllm_sparse_backend.backend.worker.open_session", lambda: tmp_path)
    return tmp_path


def worker(rank: int = 0, **more: object) -> Worker:
    profile = Profile.build(FACTS, {1: dict(enumerate(POLICIES))}, name="made", **more)
    setup = Setup(SparseConfig(min_prompt_tokens=512), "avx2", profile, facts=FACTS)
    return Worker(setup, rank)


def attended(rows: int, context: int, policies: list[Policy]) -> AttentionStats:
    q = torch.randn(rows, len(policies), 64)
    k, v = (torch.randn(context, max(1, len(policies) // 2), 64) for _ in range(2))
    return sparse_attention(q, k, v, policies)[1]


def both(one: AttentionStats, other: AttentionStats) -> AttentionStats:
    return AttentionStats(
        [a + b for a, b in zip(one.tiles_computed, other.tiles_computed, strict=True)],
        [a + b for a, b in zip(one.tiles_causal, other.tiles_causal, strict=True)],
        one.pack_seconds + other.pack_seconds,
        one.select_seconds + other.select_seconds,
        one.attend_seconds + other.attend_seconds,
    )


@pytest.mark.parametrize(
    ("rows", "context"), [(1, 1), (64, 64), (65, 200), (300, 1000), (130, 131)]
)
def test_what_keeps_every_tile_is_known_without_asking(rows: int, context: int) -> None:
    stats = attended(rows, context, [Sale(tau=0, tile=16), Sale(tau=0, tile=64)])
    assert stats.tiles_computed == stats.tiles_causal
    assert stats.tiles_causal == [total_causal_tiles(rows, context, tile) for tile in (16, 64)]


def test_heads_are_counted_of_sparse_requests_alone(session: Path) -> None:
    own = worker()
    policies = own.policies(LAYER, 4, 64)
    sparse = attended(200, 1000, POLICIES)
    kept = attended(150, 400, [Dense(), *(Sale(tau=0, tile=t) for t in (32, 64, 16))])
    own.count_stats(LAYER, both(sparse, kept), policies, kept=[(150, 400)])
    totals = read_totals(session)
    units = [1, 2, 4, 1]  # of 16 keys a tile
    for kind, tiles in enumerate((sparse.tiles_computed, sparse.tiles_causal)):
        want = [count * unit for count, unit in zip(tiles, units, strict=True)]
        assert totals.tiles[kind].tolist() == [[0] * 4, want, [0] * 4]
    for key, of_both in (
        (counters.COMPUTED, both(sparse, kept).tiles_computed),
        (counters.CAUSAL, both(sparse, kept).tiles_causal),
    ):
        assert totals.values[key] == sum(a * b for a, b in zip(of_both, units, strict=True))


def test_ranks_count_their_own_heads_and_tokens_once(session: Path) -> None:
    plan = make_plan([0, 200], [1000], min_query_tokens=64, min_prompt_tokens=512)
    for rank in range(2):
        own = worker(rank)
        heads = POLICIES[2 * rank :][:2]
        policies = own.policies(LAYER, 2, 64)
        assert policies.rows == heads
        own.count_stats(LAYER, attended(200, 1000, heads), policies, plan.kept)
        own.count_plan(plan)
    totals = read_totals(session)
    assert totals.tiles[1, 1].min() > 0
    assert totals.values[counters.SPARSE] == 200
    assert totals.values[counters.decisions(counters.SPARSE)] == 1


def test_the_estimate_is_by_the_ratio_of_rates(session: Path) -> None:
    own = worker()
    policies = own.policies(LAYER, 4, 64)
    stats = AttentionStats([10, 5, 10, 10], [40, 20, 10, 40], 1.0, 2.0, 3.0)
    own.count_stats(LAYER, stats, policies)
    rates = cost.RATES["avx2"]
    values = read_totals(session).values
    tiles = (10 + 10 + 40 + 10), (40 + 40 + 40 + 40)
    want = 3.0 * tiles[1] / tiles[0] * rates.attend / rates.base
    assert values[counters.DENSE_ESTIMATE] == pytest.approx(want)
    own.count_stats(LAYER, replace(stats, tiles_computed=[0] * 4), policies)  # nothing to divide by


@pytest.mark.parametrize("name", ["attn", "model.layers.7.attn", "a.1.b.2.c"])
def test_a_layer_that_is_none_of_the_models_has_no_heads(session: Path, name: str) -> None:
    setup = Setup(SparseConfig(), "avx2", None, facts=FACTS)
    own = Worker(setup, 0)
    policies = own.policies(name, 4, 64)
    own.count_stats(name, attended(200, 1000, POLICIES), policies)
    totals: Totals = read_totals(session)
    assert totals.values[counters.CAUSAL] > 0
    assert totals.tiles.sum() == 0


def test_what_a_profile_was_calibrated_to(session: Path) -> None:
    figures = {f"density_{n}": 0.5 for n in range(1000, 1030)}
    figures |= {"density_x": 0.1, "error_4096": 0.2, "eval_code_8192_density": 0.3}
    worker(calibration=Calibration(figures=figures))
    assert read_totals(session).expected == {str(n): 0.5 for n in range(1000, 1016)}
    assert Setup(SparseConfig(), "avx2", None).expected_density() == {}
    assert Setup(SparseConfig(), "avx2", None).shape == (0, 0)


def test_counting_follows_the_table_that_was_used(session: Path) -> None:
    own = worker()
    own.policies(LAYER, 4, 64)
    table = PolicyTable([Static(tile=64)] * 4)
    own.count_stats(LAYER, attended(64, 64, [Static(tile=64)] * 4), table)
    assert read_totals(session).tiles[1, 1].tolist() == [4] * 4
