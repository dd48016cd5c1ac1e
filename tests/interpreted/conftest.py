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


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """Its first address, and the one behind its last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    size = (last + 1) * x.element_size() if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + size


@pytest.fixture(scope="session", autouse=True)
def inside_the_arguments() -> Iterator[None]:
    """Every address that a kernel reads or writes lies in the very tensor whose pointer it comes
    from: between that one's first element and its last."""
    convert = interpreter._implicit_cvt

    def implicit_cvt(arg: Any) -> Any:
        made = convert(arg)
        if isinstance(arg, torch.Tensor):
            made.handle.attr["extent"] = _extent(arg)
        return made

    def passing_on(make: Any, at: int) -> Any:
        def passes_on(self: Any, *args: Any) -> Any:
            made = make(self, *args)
            if extent := args[at].attr.get("extent"):
                made.attr["extent"] = extent
            return made

        return passes_on

    def checked(access: Any, at: int) -> Any:
        """``at``: where its mask is among the arguments behind the pointers."""

        def checks(self: Any, *args: Any) -> Any:
            # The operation itself is the first argument of an atomic one.
            ptrs = next(arg for arg in args if isinstance(arg, TensorHandle))
            mask = args[at].data
            low, high = ptrs.attr["extent"]
            size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
            used = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.shape))
            used = used[np.broadcast_to(mask, used.shape)].astype(np.int64)
            if used.size and (used.min() < low or used.max() + size > high):
                raise IndexError("a kernel left a tensor it was given")
            return access(self, *args)

        return checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", implicit_cvt)
        for name, at in (
            ("create_addptr", 0),
            ("create_splat", 1),
            ("create_unsplat", 0),
            ("create_broadcast", 0),
            ("create_expand_dims", 0),
            ("create_reshape", 0),
            ("create_trans", 0),
        ):
            old = getattr(InterpreterBuilder, name)
            patch.setattr(InterpreterBuilder, name, passing_on(old, at))
        for name, at in (
            ("create_masked_load", 1),
            ("create_masked_store", 2),
            ("create_atomic_rmw", 3),
        ):
            old = getattr(InterpreterBuilder, name)
            patch.setattr(InterpreterBuilder, name, checked(old, at))
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
