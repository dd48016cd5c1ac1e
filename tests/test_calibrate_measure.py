"""What calibration measures of a setting is what the setting does."""

from __future__ import annotations

import random

import pytest
import torch
from _attention import make_qkv

from vllm_sparse_backend.calibrate.candidates import LADDERS, SCORED, Ladder, levels, octave_of
from vllm_sparse_backend.calibrate.measure import LayerRecord, Outcome, outcomes, sampled
from vllm_sparse_backend.ops import reference
from vllm_sparse_backend.ops.tiles import QBlock, TileList, q_blocks
from vllm_sparse_backend.selection import DENSE, AnyPolicy
from vllm_sparse_backend.selection.estimate import estimates

ROWS, LENGTH, DIM = 256, 1500, 64
SCALE = DIM**-0.5


@pytest.fixture(scope="module")
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One head, with a few sharp rows, so that thresholds differ in what they keep."""
    q, k, v = (x[:, 0].float() for x in make_qkv(3, ROWS, LENGTH, heads=1, kv_heads=1, dim=DIM))
    return q * torch.linspace(0.5, 4, ROWS)[:, None], k, v


def dense_tiles(
    policy: AnyPolicy, qkv: tuple[torch.Tensor, ...], prompt_len: int | None = None
) -> TileList:
    q, k, _ = qkv
    return reference.select(q[:, None], k[:, None], [policy], SCALE, prompt_len)


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.selector)
def test_levels_are_the_settings_that_keep_a_tile(
    ladder: Ladder, qkv: tuple[torch.Tensor, ...]
) -> None:
    q, k, _ = qkv
    blocks = q_blocks(ROWS, LENGTH)
    found = [
        levels(ladder, block, scores)
        for block, scores in zip(blocks, estimates(SCORED, q, k, SCALE, blocks), strict=True)
    ]
    differ = total = 0
    for i, setting in enumerate(ladder.settings):
        tiles = dense_tiles(setting, qkv)
        for number, level in enumerate(found):
            kept = torch.zeros(len(level), dtype=torch.bool)
            kept[tiles.row(0, number).long()] = True
            differ += int((kept != (level > i)).sum())
            total += len(level)
    # The exponentials of `mass` are linear between powers of two, and so a little off.
    assert differ <= (0.01 * total if ladder.selector == "mass" else 0)
    assert any(int(level.unique().numel()) > 2 for level in found), "nothing to tell apart"


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.selector)
def test_settings_are_nested(ladder: Ladder, qkv: tuple[torch.Tensor, ...]) -> None:
    counts = [dense_tiles(setting, qkv).computed[0] for setting in ladder.settings]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("prompt", [None, LENGTH + 1000])
def test_outcomes_are_those_of_the_op(qkv: tuple[torch.Tensor, ...], prompt: int | None) -> None:
    """At a prompt's end, and of a chunk in its midst, which has no tail of rows all scored."""
    q, k, v = qkv
    blocks = q_blocks(ROWS, LENGTH)
    measured = list(outcomes(q, k, v, SCALE, blocks, prompt_len=prompt))
    offset = LENGTH - ROWS

    def attended(policy: AnyPolicy) -> tuple[torch.Tensor, TileList]:
        tiles = dense_tiles(policy, qkv, prompt)
        out = reference.attend(q[:, None], k[:, None], v[:, None], tiles, SCALE)
        return out[:, 0], tiles

    exact, _ = attended(DENSE)
    for number, ladder in enumerate(LADDERS):
        for i in {"sale": (0, 20, 35), "mass": (0, 30), "static": (3, 5)}[ladder.selector]:
            out, tiles = attended(ladder.settings[i])
            for place, (block, size, by_ladder) in enumerate(measured):
                its: Outcome = by_ladder[number]
                rows = slice(block.first - offset, block.end - offset)
                error = (out[rows] - exact[rows]).abs().sum(1)
                torch.testing.assert_close(size, exact[rows].abs().sum(1), rtol=1e-4, atol=1e-4)
                if int(its.kept[i]) == 16 * len(tiles.row(0, place)):  # `mass` may be off by one
                    torch.testing.assert_close(its.error[i], error, rtol=1e-3, atol=1e-3)
                    square = (out[rows] - exact[rows]).square().sum()
                    torch.testing.assert_close(its.square[i], square, rtol=2e-3, atol=1e-4)
                else:
                    assert ladder.selector == "mass"


def test_a_layer_adds_up_steps_and_heads() -> None:
    q, k, v = make_qkv(5, 128, 700, heads=4, kv_heads=2, dim=64)
    record = LayerRecord(4)
    record.add(q[:64], k[:636], v[:636], SCALE, q_blocks(64, 636))
    record.add(q[64:], k, v, SCALE, q_blocks(64, 700))
    sums = record.sums()
    assert sums.octaves == [octave_of(636)] == [octave_of(700)]
    assert sums.size.shape == (4, len(sums.octaves))
    assert sums.rows.sum() == 128
    exact = reference.attend(q, k, v, reference.select(q, k, [DENSE] * 4, SCALE), SCALE)
    torch.testing.assert_close(
        torch.tensor(sums.size.sum(1)), exact.double().abs().sum((0, 2)), rtol=0.01, atol=0.1
    )
    for number, ladder in enumerate(LADDERS):
        assert sums.error[number].shape == (4, len(sums.octaves), len(ladder.settings))
        assert (sums.worst[number] <= sums.error[number] + 1e-9).all()
        assert (sums.kept[number] <= sums.causal[None, :, None]).all()
        assert (sums.mass[number] <= sums.rows[None, :, None] * (1 + 1e-5)).all()


def test_only_a_prompts_end_has_a_tail() -> None:
    q, k, v = make_qkv(5, 128, 700, heads=2, kv_heads=1, dim=64)

    def kept(prompt: int | None) -> list[float]:
        record = LayerRecord(2)
        record.add(q, k, v, SCALE, q_blocks(128, 700), prompt)
        return [float(its.sum()) for its in record.sums().kept]

    assert kept(700) == kept(None)
    for ladder, there, midst in zip(LADDERS, kept(700), kept(5000), strict=True):
        assert there == midst if ladder.selector == "static" else there > midst


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no q block was measured"):
        LayerRecord(1).sums()


def test_sampled_blocks() -> None:
    rng = random.Random(0)
    for query_len, seq_len, count in [
        (2048, 2048, 4),
        (2048, 8192, 1),
        (100, 5000, 8),
        (64, 64, 3),
    ]:
        blocks = q_blocks(query_len, seq_len)
        chosen = sampled(query_len, seq_len, count, rng)
        assert len(chosen) == min(count, len(blocks))
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(blocks)
        assert chosen[-1] == blocks[-1], "questions stand at the end"


def test_a_slope_moves_thresholds_as_the_kernels_do() -> None:
    for ladder in LADDERS:
        for slope in ladder.slopes:
            for octave in (11, 12, 13, 14, 17):
                moved = ladder.moved(slope, octave)
                i = 21
                if ladder.selector == "static":
                    assert moved == 0
                    continue
                context = round(2 ** (octave - 0.5))
                there = ladder.at(i, slope).tau_at(context)  # type: ignore[union-attr]
                on_ladder = ladder.settings[max(0, min(i + moved, len(ladder.settings) - 1))]
                if 0 <= i + moved < len(ladder.settings):
                    assert there == pytest.approx(on_ladder.tau, rel=0.01)  # type: ignore[union-attr]


def test_levels_of_what_cannot_be_judged() -> None:
    q, k, _ = (x[:, 0].float() for x in make_qkv(1, 64, 700, heads=1, kv_heads=1, dim=64))
    k[400] = torch.nan
    block = q_blocks(64, 700)[0]
    assert isinstance(block, QBlock)
    scores = next(iter(estimates(SCORED, q, k, SCALE, [block])))
    for ladder in LADDERS[:2]:
        assert levels(ladder, block, scores)[400 // 16] == len(ladder.settings)
