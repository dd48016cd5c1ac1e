"""The launch table has an entry for all that it promises, and says so of all else."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from vllm_sparse_backend.ops.triton.launch import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    MOST_SHARED,
    MOST_TOGETHER,
    launch,
    packs,
    padded,
    share_of,
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_layer_has_a_launch(arch: str) -> None:
    for head_dim, group, dtype in product(HEAD_DIMS, range(1, 17), DTYPES):
        how = launch(arch, head_dim, group, dtype)
        assert group % how.share == 0
        assert 1 <= how.share <= MOST_SHARED
        assert not how.attend_repeat or padded(head_dim) != head_dim
        for shape in (how.keys, how.anchor, how.score, how.compact, how.attend):
            for number in (shape.block, shape.warps):
                assert number == padded(number), f"{number} is no power of two"
            assert shape.stages >= 1
        # A product is of whole subtiles, and a word of 512 keys of whole products.
        assert how.attend.block % 16 == how.anchor.block % 16 == how.score.block % 16 == 0
        for score in (how.score, how.score_packed):
            if score is not None:
                assert 1 <= score.together <= MOST_TOGETHER
                assert 512 % score.block == score.block % (16 * score.parts) % 16 == 0
        assert packs(arch, "fp4") is (how.score_packed is not None)
        assert not packs(arch, 4)


@pytest.mark.parametrize(
    ("group", "share"), [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (8, 8), (9, 3), (12, 6), (16, 8)]
)
def test_heads_of_a_group_are_shared_out_evenly(group: int, share: int) -> None:
    assert share_of(group) == share


@pytest.mark.parametrize(
    ("at", "word"),
    [
        (("sm_75", 128, 4, torch.bfloat16), "architecture"),
        (("sm_90", 72, 4, torch.bfloat16), "head_dim"),
        (("sm_90", 128, 4, torch.float64), "dtype"),
    ],
)
def test_what_the_table_lacks_is_an_error(at: tuple[str, int, int, torch.dtype], word: str) -> None:
    with pytest.raises(ValueError, match=f"{word}: want one of .*, got "):
        launch(*at)
