"""That the tests beside this one would notice a kernel that leaves its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

SIZE = 32


@triton.jit
def _move(
    source: Any, out: Any, shift: int, count: int, SIZE: tl.constexpr, HOW: tl.constexpr
) -> None:
    """``count`` numbers from ``source`` to ``out``; what HOW names is ``shift`` elements off."""
    lane = tl.arange(0, SIZE)
    where = tl.reshape(lane, [SIZE // 4, 4])
    grid = tl.reshape(source + lane, [SIZE // 4, 4])
    if HOW == "load":
        grid += shift
    moved = tl.reshape(tl.load(grid, mask=where < count, other=0), [SIZE])
    if HOW == "store":
        tl.store((out + shift)[None] + lane, moved, mask=lane < count)
    elif HOW == "add":
        tl.atomic_add((out + shift)[None] + lane, moved, mask=lane < count)
    else:
        tl.store(out + lane, moved)


@triton.jit
def _row(source: Any, out: Any, stride: int, D: tl.constexpr) -> None:
    """Of ``source`` the D numbers from ``stride`` on."""
    channel = tl.arange(0, D)
    tl.store(out + channel, tl.load((source + stride)[None, None] + channel[None, :]).reshape(D))


def _tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """In one storage, with room on both sides of either."""
    both = torch.arange(5 * SIZE, dtype=torch.int32)
    return both[3 * SIZE : 4 * SIZE], both[SIZE : 2 * SIZE]


@pytest.mark.parametrize("how", ["load", "store", "add"])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_one_element_outside_is_noticed(how: str, shift: int) -> None:
    source, out = _tensors()
    before = out.clone()
    if shift == 0:
        _move[(1,)](source, out, shift, SIZE, SIZE=SIZE, HOW=how)
        assert torch.equal(out, source + before if how == "add" else source)
        return
    with pytest.raises(InterpreterError, match="a kernel left a tensor it was given"):
        _move[(1,)](source, out, shift, SIZE, SIZE=SIZE, HOW=how)
    assert torch.equal(out, before)


@pytest.mark.parametrize("how", ["load", "store", "add"])
def test_what_is_masked_may_be_anywhere(how: str) -> None:
    source, out = _tensors()
    _move[(1,)](source, out, 1, SIZE - 1, SIZE=SIZE, HOW=how)
    with pytest.raises(InterpreterError, match="a kernel left a tensor"):
        _move[(1,)](source, out, 1 << 20, 1, SIZE=SIZE, HOW=how)


def test_another_tensor_that_was_given_is_not_its_own() -> None:
    both = torch.zeros(2, 2, 16)
    first, second = both
    out = torch.empty(16)
    _row[(1,)](both, out, 16, D=16)
    _row[(1,)](first, out, 16, D=16)
    with pytest.raises(InterpreterError, match="a kernel left a tensor"):
        _row[(1,)](first[:1], second, 16, D=16)
    with pytest.raises(InterpreterError, match="a kernel left a tensor"):
        _row[(1,)](torch.empty(0), out, 0, D=16)
