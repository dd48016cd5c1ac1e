"""A device without a GPU: tensors that lie there meet none of the host's.

It goes by the name ``meta``, for which torch asks no driver. Its operators are the host's, on the
tensors inside. What mixes it with the host raises, as on a GPU, and what the host would wait for is
written down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
# Whose result, or its shape, the host has to know; of CUDA's `bincount`, the highest number.
READ = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
MOVED = {aten._to_copy.default, aten.copy_.default}


class Away(torch.Tensor):
    """A tensor of that device; ``inside`` has its numbers."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Away:
        at = inside.stride(), inside.storage_offset()
        made: Away = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, *at, dtype=inside.dtype, device=ELSEWHERE
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: want it within `elsewhere`")


class _Operators(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        away = [isinstance(x, Away) for x in tensors]
        there = any(away)
        if (device := kwargs.get("device")) is not None:
            if tensors and there != (device == ELSEWHERE):
                self._waits.append(str(func))
            there, kwargs["device"] = device == ELSEWHERE, torch.device("cpu")
        elif func in MOVED and there != all(away):
            self._waits.append(str(func))
            there = away[0]
        elif func in INDEXED and there:
            index = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, Away) for x in index):
                self._waits.append(str(func))
        elif there and not all(x or t.dim() == 0 for x, t in zip(away, tensors, strict=True)):
            raise RuntimeError(f"{func}: tensors on two devices")
        if there and func in READ:
            self._waits.append(str(func))
        args, kwargs = tree_map(_inside, (args, kwargs))
        made = func(*args, **kwargs)
        if not there:
            return made
        known = {id(x.inside): x for x in tensors if isinstance(x, Away)}  # changed in place
        return tree_map(
            lambda x: known.get(id(x), Away(x)) if isinstance(x, torch.Tensor) else x, made
        )


class _Functions(TorchFunctionMode):
    """What torch does before it asks for operators, and for this device as if it had no numbers."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") == ELSEWHERE:
            self._waits.append("torch.tensor")
            return Away(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and type(args[0]) is Away:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, list) for x in index):
                self._waits.append("a list as an index")
                index = tuple(Away(torch.tensor(x)) if isinstance(x, list) else x for x in index)
                args = args[0], index, *args[2:]
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            return _matmul(*args)
        return func(*args, **kwargs)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of vectors torch changes a shape in place, which a tensor around another is not told."""
    if a.dim() == 1 and b.dim() == 2:
        return torch.mm(a[None], b)[0]
    if a.dim() == 2 and b.dim() == 1:
        return torch.mm(a, b[:, None])[:, 0]
    return torch.matmul(a, b)


def _inside(x: Any) -> Any:
    return x.inside if isinstance(x, Away) else x


@contextmanager
def elsewhere() -> Iterator[list[str]]:
    """The device is there; what the host waits for goes into the list."""
    waits: list[str] = []
    with torch.no_grad(), _Functions(waits), _Operators(waits):
        yield waits
