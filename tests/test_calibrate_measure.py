"""What calibration measures of a setting is what the setting does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _attention import make_qkv

from vllm_sparse_backend.backend.observe import Call
from vllm_sparse_backend.calibrate.candidates import LADDERS, SCORED, Ladder, levels, octave_of
from vllm_sparse_backend.calibrate.measure import LayerRecord, Outcome, of_step, outcomes, sampled
from vllm_sparse_backend.calibrate.record import Recorder
from vllm_sparse_backend.calibrate.table import Group, Part
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.ops import layout, reference
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


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
def test_levels_are_the_settings_that_keep_a_tile(
    ladder: Ladder, qkv: tuple[torch.Tensor, ...]
) -> None:
    q, k, _ = qkv
    blocks = q_blocks(ROWS, LENGTH)
    found = [
        levels(ladder, block, scores)
        for block, scores in zip(
            blocks, estimates(SCORED[ladder.row_stride or 1], q, k, SCALE, blocks), strict=True
        )
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


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
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
        assert there > midst if ladder.row_stride > 1 else there == midst


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no q block was measured"):
        LayerRecord(1).sums()


@pytest.mark.parametrize("count", [1, 4, 16, 1000])
@pytest.mark.parametrize("length", [1, 64, 65, 2304, 4099, 32767, 131071])
def test_sampled_blocks(length: int, count: int) -> None:
    every = q_blocks(length, length)
    chosen = sampled(length, count, "seed")
    assert chosen == sorted(set(chosen)) == sampled(length, count, "seed")
    assert set(chosen) <= {block.start for block in every}
    assert chosen[-1] == every[-1].start, "questions stand at the end"
    # As many as the setting says at any length, one from each of as many equal parts.
    assert len(chosen) == min(count, len(every))
    parts = [start // 64 * len(chosen) / len(every) for start in chosen]
    assert all(i - 1 < part < i + 1 for i, part in enumerate(parts))


def test_sampled_blocks_lie_anywhere_in_a_chunk() -> None:
    at = [start // 64 % 32 for seed in range(20) for start in sampled(32768, 16, f"{seed}")[:-1]]
    counts = [at.count(place) for place in range(32)]
    assert max(counts) < 30 and counts.count(0) <= 2, "each of 32 gets some 9 of 300"
    assert sampled(32768, 16, "0") != sampled(32768, 16, "1")


def test_the_same_blocks_are_measured_in_any_chunks() -> None:
    length, group = 6100, Group("text", 6144)
    q, k, v = make_qkv(1, length, length, heads=2, kv_heads=1)
    cache, starts = layout.pack(k, v), sampled(length, 8, "seed")
    table = torch.arange(len(cache), dtype=torch.int32)[None]

    def measured(chunk: int) -> tuple[Part, int]:
        told: list[None] = []
        recorder = Recorder(group, SparseConfig(), starts, length, lambda: told.append(None))
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            at, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, end - begin], [end]))
            recorder(Call(3, [0], q[begin:end], cache, table, at, ends, 0.125, "vec"))
        return recorder.part(), len(told)

    (whole, once), (parts, often) = measured(length), measured(2048)
    assert (once, often) == (1, 3)
    assert whole.rows.sum() == parts.rows.sum() == 7 * 64 + length % 64
    assert list(whole.octaves) == list(parts.octaves)
    for name in ("size", "rows", "causal"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-5)
    # Where chunks meet within a block, both have rows of it.
    assert [b for end in (3000, 6000) for b in of_step([2944, 3008], 3000, end)] == [
        QBlock(2944, 2944, 3000), QBlock(2944, 3000, 3008), QBlock(3008, 3008, 3072),
    ]  # fmt: skip
    assert of_step([64], 64, 64) == []


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
    scores = next(iter(estimates(SCORED[4], q, k, SCALE, [block])))
    for ladder in LADDERS[:2]:
        assert levels(ladder, block, scores)[400 // 16] == len(ladder.settings)
