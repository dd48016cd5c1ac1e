"""The table of what was measured, and what is chosen from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_backend.calibrate.candidates import LADDERS, THRESHOLDS
from vllm_sparse_backend.calibrate.measure import BY_LADDER
from vllm_sparse_backend.calibrate.parts import PartsFolder
from vllm_sparse_backend.calibrate.rules import NAT, Rule, choose, divergence
from vllm_sparse_backend.calibrate.table import (
    EXACT,
    Group,
    Part,
    Table,
    all_candidates,
    relative_cost,
    tabulate,
)
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.selection import DENSE, Sale, Static
from vllm_sparse_backend.target import Cpu, Gpu

LAYERS, HEADS, DIM = 2, 3, 64
SENSITIVITY = np.array([[1.0, 0.1, 10.0], [1e-3, 1.0, 0.3]])
ROWS, CAUSAL = 640.0, 64_000.0


def part(seed: int, group: Group, octaves: Sequence[int] = (12, 13)) -> Part:
    """Sums as measuring gives them: along a ladder error grows, and what is kept shrinks."""
    rng = np.random.default_rng(seed)
    shape = (LAYERS, HEADS, len(octaves))
    by_ladder: dict[str, Any] = {name: [] for name in BY_LADDER}
    for ladder in LADDERS:
        down = np.sort(rng.random((*shape, len(ladder.settings))), 3)
        by_ladder["error"].append(100 * down**4 * ROWS / 10)
        by_ladder["square"].append(down**8 * ROWS)
        by_ladder["worst"].append(100 * down**2)
        by_ladder["worst_size"].append(np.full_like(down, 200.0))
        by_ladder["mass"].append((1 - down / 3) * ROWS)
        by_ladder["kept"].append((1 - down) * CAUSAL)
    each = np.full(len(octaves), 1.0)
    return Part(group, octaves, np.full(shape, 100 * ROWS), ROWS * each, CAUSAL * each, **by_ladder)


@pytest.fixture(scope="module")
def table() -> Table:
    groups = [Group(kind, length) for kind in ("copy", "text") for length in (4096, 8192)]
    return tabulate([part(seed, groups[seed % 4]) for seed in range(6)])


@cache
def small_table() -> Table:
    return tabulate([part(seed, Group("text", 4096 << seed % 2)) for seed in range(3)])


def twin_heads(table: Table) -> Table:
    """The same with the first layer's last head like its first."""
    made = {name: getattr(table, name).copy() for name in EXACT}
    for its in made.values():
        its[:, :, 0, 2] = its[:, :, 0, 0]
    return replace(table, **made)


@pytest.fixture(scope="module")
def cost(table: Table) -> np.ndarray:
    return relative_cost(table, Cpu("avx2"), DIM)


def test_the_table_has_every_candidate_and_group(table: Table) -> None:
    shape = (len(all_candidates()), 4, LAYERS, HEADS)
    assert table.density.shape == table.error.shape == table.recall.shape == shape
    assert table.candidates[-1].policy == DENSE
    assert (table.density[-1] == 1).all() and (table.error[-1] == 0).all()
    assert table.lengths == [4096, 8192]


def test_a_group_is_its_documents_taken_together(table: Table) -> None:
    group = table.groups[0]
    assert group == Group("copy", 4096)
    together = [part(0, group), part(4, group)]
    error = (
        sum(p.error[0].sum(2) for p in together) / sum(p.size.sum(2) for p in together)[..., None]
    )
    np.testing.assert_allclose(np.moveaxis(error, 2, 0), table.error[: len(THRESHOLDS), 0])


def test_slopes_take_each_octave_at_its_own_threshold(table: Table) -> None:
    its = part(0, Group("text", 8192))
    made = tabulate([its])
    ladder = LADDERS[0]
    i, slope = 20, -0.5
    candidate = next(
        n
        for n, c in enumerate(made.candidates)
        if c.ladder == 0 and c.setting == i and c.slope == slope
    )
    kept = sum(
        its.kept[0][:, :, place, i + ladder.moved(slope, octave)]
        for place, octave in enumerate(its.octaves)
    )
    np.testing.assert_allclose(made.density[candidate, 0], kept / its.causal.sum())
    policy = made.candidates[candidate].policy
    assert isinstance(policy, Sale)
    assert (policy.tau, policy.tau_slope) == (ladder.settings[i].tau, slope)  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", [Rule.HEAD, Rule.GLOBAL, Rule.LOSS])
def test_no_error_is_dense_and_any_is_the_cheapest(
    table: Table, cost: np.ndarray, rule: Rule
) -> None:
    dense = choose(table, cost, rule, 0.0, sensitivity=SENSITIVITY)
    assert (dense == len(table.candidates) - 1).all()
    least = choose(table, cost, rule, 1.0, sensitivity=SENSITIVITY)
    assert (least == cost.argmin(0)).all()


@given(budget=st.floats(0.0005, 0.5), tail=st.floats(0.01, 2))
def test_every_head_is_within_its_budget(budget: float, tail: float) -> None:
    table = small_table()
    cost = relative_cost(table, Cpu("avx2"), DIM)
    choice = choose(table, cost, Rule.HEAD, budget, tail)
    error = np.take_along_axis(table.error.max(1), choice[None], 0)[0]
    worst = np.take_along_axis(table.tail.max(1), choice[None], 0)[0]
    its = np.take_along_axis(cost, choice[None], 0)[0]
    assert (error <= budget).all() and (worst <= tail).all()
    # Nothing cheaper would have done.
    ok = (table.error.max(1) <= budget) & (table.tail.max(1) <= tail)
    assert (its == np.where(ok, cost, np.inf).min(0)).all()


def test_a_global_budget_buys_more_than_one_for_each(table: Table, cost: np.ndarray) -> None:
    of = {}
    for rule in (Rule.HEAD, Rule.GLOBAL):
        choice = choose(table, cost, rule, 0.02)[None]
        assert np.take_along_axis(table.error.max(1), choice, 0).mean() <= 0.02
        of[rule] = np.take_along_axis(cost, choice, 0).mean()
    assert of[Rule.GLOBAL] < of[Rule.HEAD]


@given(budget=st.floats(1e-6, 0.5))
def test_a_loss_budget_goes_where_the_model_does_not_mind(budget: float) -> None:
    table = twin_heads(small_table())
    cost = relative_cost(table, Cpu("avx2"), DIM)
    nats = divergence(table, SENSITIVITY)
    np.testing.assert_allclose(nats[0], table.square[0] * SENSITIVITY / 2)

    def spent(choice: np.ndarray) -> float:
        error = np.take_along_axis(table.error.max(1), choice[None], 0)[0].mean()
        return float(error + NAT * np.take_along_axis(nats.max(1), choice[None], 0)[0].sum())

    choice = choose(table, cost, Rule.LOSS, budget, sensitivity=SENSITIVITY)
    assert spent(choice) <= budget
    density = np.take_along_axis(table.density.mean(1), choice[None], 0)[0]
    assert density[0, 2] >= density[0, 0]
    # Exchanging the twins' sensitivities exchanges what they are allowed.
    swapped = SENSITIVITY.copy()
    swapped[0] = swapped[0, ::-1]
    exchanged = choose(table, cost, Rule.LOSS, budget, sensitivity=swapped)
    assert (exchanged[0] == choice[0, ::-1]).all() and (exchanged[1] == choice[1]).all()


def test_sales_rule_halves_from_its_start(table: Table, cost: np.ndarray) -> None:
    halvings = {0.008 / 2**k for k in range(7)}
    seen = set()
    for theta in (1e-12, 0.05, 0.5, 2.0, 50.0):
        choice = choose(table, cost, Rule.SALE, theta)
        for place in np.ndindex(LAYERS, HEADS):
            policy = table.candidates[choice[place]].policy
            seen.add(policy.selector)
            if policy != DENSE:
                assert isinstance(policy, Sale)
                assert min(abs(policy.tau / tau - 1) for tau in halvings) < 0.01
                assert policy.tau > 1e-4
                assert table.absolute[choice[place], :, *place].max() < theta
    assert seen == {"sale", "dense"}


def test_minferences_rule_has_the_least_error_for_the_work(table: Table, cost: np.ndarray) -> None:
    choice = choose(table, cost, Rule.MINFERENCE, 0.4)
    its = np.take_along_axis(cost, choice[None], 0)[0]
    error = np.take_along_axis(table.error.max(1), choice[None], 0)[0]
    assert (its <= 0.4).all()
    assert (error == np.where(cost <= 0.4, table.error.max(1), np.inf).min(0)).all()


def test_cost_of_dense_is_one_and_grows_with_density(table: Table, cost: np.ndarray) -> None:
    assert np.allclose(cost[-1], 1)
    of_sale = cost[: len(THRESHOLDS)]
    assert (np.diff(of_sale, axis=0) <= 1e-12).all(), "a greater threshold costs no more"
    assert (of_sale >= table.density[: len(THRESHOLDS)].mean(1)).all(), "selection costs something"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_a_gpus_costs_are_the_mean_of_both_ends(table: Table, arch: str) -> None:
    target = Gpu(arch, 3)
    made = relative_cost(table, target, DIM)
    ends = [relative_cost(table, _Alone(end), DIM) for end in target.ends]
    np.testing.assert_allclose(made, (ends[0] + ends[1]) / 2)
    assert np.allclose(made[-1], 1)
    of_sale = slice(0, len(THRESHOLDS))
    selection = (made - table.density.mean(1))[of_sale]
    assert (np.diff(made[of_sale], axis=0) <= 1e-12).all()
    assert selection.min() > 0 and np.ptp(selection) < 1e-9, "whatever the threshold"
    # A window is found without scores: next to nothing beside them.
    window = next(i for i, its in enumerate(table.candidates) if isinstance(its.policy, Static))
    assert (made - table.density.mean(1))[window].max() < 0.2 * selection.min()


class _Alone(Gpu):
    """One end of the range by itself."""

    def __init__(self, end: Any) -> None:
        super().__init__(end.name, end.group, end.chunk, end.end)

    @property
    def ends(self) -> tuple[Any, ...]:
        return (self,)


def test_finished_parts_are_found_again(tmp_path: Path) -> None:
    folder, group = PartsFolder(tmp_path / "p.parts"), Group("copy", 4096)
    its = part(1, group)
    assert folder.load("copy-4096-0", "key", group) is None
    folder.save("copy-4096-0", "key", its)
    again = folder.load("copy-4096-0", "key", group)
    assert again is not None
    assert again.group == group and list(again.octaves) == list(its.octaves)
    np.testing.assert_array_equal(again.error[1], its.error[1])
    np.testing.assert_array_equal(again.size, its.size)
    assert folder.load("copy-4096-0", "another key", group) is None


def test_a_sensitivity_is_found_again(tmp_path: Path) -> None:
    folder = PartsFolder(tmp_path)
    assert folder.load_sensitivity("key") is None
    folder.save_sensitivity("key", SENSITIVITY[:, ::-1])
    np.testing.assert_array_equal(folder.load_sensitivity("key"), SENSITIVITY[:, ::-1])
    assert folder.load_sensitivity("another") is None


def test_a_part_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    folder, group = PartsFolder(tmp_path), Group("copy", 4096)
    folder.save("a", "key", part(1, group))
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 5):
        path.write_bytes(whole[:cut])
        assert folder.load("a", "key", group) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(SparsePrefillError, match="cannot be written"):
        PartsFolder(blocked).save("a", "key", part(1, Group("text", 4096)))
