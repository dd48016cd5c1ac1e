"""The Triton kernels under Triton's interpreter, in processes of their own.

Triton decides when a kernel is decorated whether it is interpreted, so these tests run where
TRITON_INTERPRET=1 was set at the start: `tests/test_ops_triton.py` starts them, and they can be run
alone by `TRITON_INTERPRET=1 pytest tests/interpreted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    return (
        torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.uint16).numpy()
    )


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="session", autouse=True)
def mended_bfloat16() -> Iterator[None]:
    """Triton 3.9's interpreter multiplies bfloat16 matrices by their raw bits, and rounds towards
    zero where a device rounds to the nearest; both without a word."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(x: Any) -> Any:
        is_bfloat16 = x.dtype.scalar == tl.bfloat16
        return TensorHandle(_from_bfloat16(x.data), tl.float32) if is_bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_from_bfloat16(src.data), tl.float32)
        return cast(self, src, dst_type)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        for name in ("create_fp_ext", "create_fp_trunc"):
            patch.setattr(InterpreterBuilder, name, cast_impl)
        yield


@pytest.fixture(scope="session", autouse=True)
def inside_the_arguments() -> Iterator[None]:
    """Every address that a kernel reads or writes lies in a tensor it was given."""
    ranges: list[tuple[int, int]] = []
    call = GridExecutor.__call__

    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        storages = [x.untyped_storage() for x in tensors]
        ranges[:] = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        return call(self, *args, **kwargs)

    def check(ptrs: Any, mask: Any) -> None:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        at = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
        at = at[np.broadcast_to(mask.data, at.shape)].astype(np.int64)
        low, high = np.array(ranges, np.int64).T
        own = np.searchsorted(low, at, "right") - 1
        if at.size and ((own < 0) | (at + size > high[own])).any():
            raise IndexError("a kernel left the tensors it was given")

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, how: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask)
        return atomic(self, how, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", enter)
        patch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", create_masked_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", create_atomic_rmw)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_patch_of_the_language() -> Iterator[None]:
    """Whenever a kernel calls another function, the interpreter patches the language again, for
    milliseconds, though it is patched for as long as the kernel runs."""
    patched: set[tuple[int, ...]] = set()
    call, patch_lang = GridExecutor.__call__, interpreter._patch_lang

    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return call(self, *args, **kwargs)

    def once(fn: Any) -> Any:
        modules = tuple(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if modules in patched:
            return None  # which nobody reads: only a kernel's own scope is restored
        patched.add(modules)
        return patch_lang(fn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", enter)
        patch.setattr(interpreter, "_patch_lang", once)
        yield
