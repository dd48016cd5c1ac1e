"""The compiled CPU core through ctypes: availability, instruction sets, the call.

Torch tensors go in as addresses and strides; the core knows no torch. Arguments are checked
in ``ops.api``, not here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sparse_backend.selection import Dense, ListSelector, Mass, Sale, Static

if TYPE_CHECKING:
    import torch

    from vllm_sparse_backend.ops.policies import PolicyTable
    from vllm_sparse_backend.ops.tiles import TileList

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
KV_LAYOUTS = ("vec", "vec16", "amx")
DTYPES = ("bfloat16", "float16", "float32")

_ABI = 8
_LAYOUT = {"vec": 0, "vec16": 0, "amx": 1}
_DTYPE = {name: i for i, name in enumerate(DTYPES)}
_FP4 = 14  # bits of a 4-bit float: VSB_FP4
_LIST = 3  # the selector that takes its tiles from the caller


class CoreUnavailable(RuntimeError):
    """The compiled core is missing or cannot run here; the message says what to do."""


class _Policy(ctypes.Structure):
    _fields_ = (
        ("selector", ctypes.c_int32),
        ("tile", ctypes.c_int32),
        ("sink", ctypes.c_int32),
        ("local", ctypes.c_int32),
        ("growth", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("row_stride", ctypes.c_int32),
        ("tail", ctypes.c_int32),
        ("dense_below", ctypes.c_int32),
        ("tau", ctypes.c_float),
        ("tau_slope", ctypes.c_double),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("pages", ctypes.c_void_p),
        ("first_row", ctypes.c_int64),
        ("query_len", ctypes.c_int32),
        ("seq_len", ctypes.c_int32),
        ("prompt_len", ctypes.c_int32),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("q_row", ctypes.c_int64),
        ("q_head", ctypes.c_int64),
        ("out_row", ctypes.c_int64),
        ("out_head", ctypes.c_int64),
        ("kv", ctypes.c_void_p),
        ("kv_page", ctypes.c_int64),
        ("kv_head", ctypes.c_int64),
        ("requests", ctypes.POINTER(_Request)),
        ("policies", ctypes.POINTER(_Policy)),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("list_indptr", ctypes.c_void_p),
        ("list_tiles", ctypes.c_void_p),
        ("tiles_computed", ctypes.POINTER(ctypes.c_int64)),
        ("tiles_causal", ctypes.POINTER(ctypes.c_int64)),
        ("pack_seconds", ctypes.POINTER(ctypes.c_double)),
        ("select_seconds", ctypes.POINTER(ctypes.c_double)),
        ("attend_seconds", ctypes.POINTER(ctypes.c_double)),
        ("tiles_out", ctypes.c_void_p),
    )


_library_path = Path(__file__).with_name("_core.so")
_forced_isa: str | None = None


def use_library(path: Path | None) -> None:
    """Load another build of the core from now on (None: the installed one). For tests."""
    global _library_path  # noqa: PLW0603
    _library_path = path or Path(__file__).with_name("_core.so")
    _library.cache_clear()
    isas.cache_clear()
    set_isa(None)


def library() -> Path:
    """The file of the compiled core, which may be missing."""
    return _library_path


@functools.cache
def _library() -> ctypes.CDLL:
    if not _library_path.exists():
        raise CoreUnavailable(
            f"the compiled CPU core {_library_path.name} is missing: this install was made "
            "without a C++ compiler. Install g++ (11 or newer), then reinstall with "
            "'pip install --force-reinstall --no-deps vllm-sparse-backend'"
        )
    try:
        library = ctypes.CDLL(str(_library_path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    except OSError as error:
        raise CoreUnavailable(
            f"the compiled CPU core does not load ({error}): reinstall vllm-sparse-backend"
        ) from error
    if (abi := library.vsb_abi()) != _ABI:
        raise CoreUnavailable(
            f"the compiled CPU core has interface {abi}, want {_ABI}: it is from another "
            "version of this package; reinstall vllm-sparse-backend"
        )
    library.vsb_isas.restype = ctypes.c_char_p
    library.vsb_usable.argtypes = (ctypes.c_char_p,)
    library.vsb_peak.argtypes = (ctypes.c_char_p, ctypes.POINTER(ctypes.c_double))
    library.vsb_forward.argtypes = (ctypes.c_char_p, ctypes.POINTER(_Problem))
    return library


@functools.cache
def isas() -> dict[str, bool]:
    """Every compiled instruction set, best first, and whether this machine can run it."""
    names = _library().vsb_isas().decode().split(",")
    return {name: _library().vsb_usable(name.encode()) == 1 for name in names}


def set_isa(name: str | None) -> None:
    """Use the named instruction set from now on (None: the best). Never another one instead.

    Raises ValueError if it is unknown or this machine cannot run it.
    """
    global _forced_isa  # noqa: PLW0603
    if name is not None:
        if name not in isas():
            raise ValueError(f"cpu_isa: want one of {list(isas())}, got {name!r}")
        if not isas()[name]:
            usable = [isa for isa, ok in isas().items() if ok]
            raise ValueError(f"cpu_isa: {name!r} cannot run on this machine, want one of {usable}")
    _forced_isa = name


def active_isa() -> str:
    """The instruction set in use. Raises CoreUnavailable where there is none."""
    if _forced_isa is not None:
        return _forced_isa
    for name, usable in isas().items():
        if usable:
            return name
    raise CoreUnavailable(
        f"this machine runs none of the instruction sets {list(isas())}: the CPU core needs "
        "an x86-64 with AVX2, FMA and F16C"
    )


def peak() -> dict[str, float]:
    """What one thread reaches with the active instruction set, in 1e9 operations a second.

    By dtype of the products: ``float32``, ``bfloat16`` and ``int8``; a multiply-add is two
    operations. Measured anew, of registers alone, in some 0.1 s.
    """
    gops = (ctypes.c_double * 3)()
    if _library().vsb_peak(active_isa().encode(), gops):
        raise CoreUnavailable(f"{active_isa()} cannot run on this machine")
    return dict(zip(("float32", "bfloat16", "int8"), gops, strict=True))


def _native_policies(table: PolicyTable) -> ctypes.Array[_Policy]:
    if table.native is None:
        rows = (_Policy * len(table.rows))()
        for row, policy, dense_below in zip(rows, table.rows, table.dense_below, strict=True):
            row.dense_below = dense_below
            match policy:
                case Dense():
                    row.selector, row.tile = 0, 16
                case Static():
                    row.selector = 1
                case Sale() | Mass():
                    row.selector = 2 if isinstance(policy, Sale) else 4
                    row.tau, row.tau_slope = policy.tau, policy.tau_slope
                    row.bits = _FP4 if policy.bits == "fp4" else policy.bits
                    row.row_stride = policy.row_stride
                    row.tail = policy.tail
                case ListSelector():  # until it is given its tiles, it keeps all: at a tau of 0
                    row.selector = 2
            if not isinstance(policy, Dense):
                row.tile, row.sink = policy.tile, policy.sink
                row.local, row.growth = policy.local, policy.growth_units
        table.native = rows
    return table.native  # type: ignore[return-value]


def _listed_policies(
    table: PolicyTable, tiles: Sequence[int], listed: Sequence[int] | None
) -> ctypes.Array[_Policy]:
    """The table's policies, but for the heads that are ``listed`` (None: all)."""
    rows = (_Policy * len(tiles))(*_native_policies(table))
    for head in range(len(tiles)) if listed is None else listed:
        rows[head] = _Policy(selector=_LIST, tile=tiles[head])
    return rows


def forward(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    table: PolicyTable,
    scale: float,
    requests: Sequence[int],
    kv_layout: str,
    out: torch.Tensor,
    tiles_out: torch.Tensor | None,
    tiles_in: TileList | None = None,
    prompt_lens: Sequence[int] | None = None,
    listed: Sequence[int] | None = None,
) -> tuple[list[int], list[int], float, float, float]:
    """Attention of the given requests into ``out``; shapes as in ``paged_sparse_attention``.

    ``tiles_out``: uint8 [Hq, q blocks of the one request, ceil(seq_len / 16)], set to 1 where
    computed. ``tiles_in``: compute exactly these tiles of the one request, whatever the
    policies say, in all heads or in those that are ``listed``. Returns tiles computed and causal
    per q head, then seconds of packing, selection and attention summed over threads.
    """
    num_heads = q.shape[1]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    prompts = lengths if prompt_lens is None else prompt_lens
    native_requests = (_Request * len(requests))()
    for native, r in zip(native_requests, requests, strict=True):
        native.pages = block_table.data_ptr() + 4 * r * block_table.stride(0)
        native.first_row = starts[r]
        native.query_len = starts[r + 1] - starts[r]
        native.seq_len = lengths[r]
        native.prompt_len = prompts[r]
    computed, causal = (ctypes.c_int64 * num_heads)(), (ctypes.c_int64 * num_heads)()
    pack, select, attend = (ctypes.c_double(0) for _ in range(3))
    problem = _Problem(
        q=q.data_ptr(),
        out=out.data_ptr(),
        q_row=q.stride(0),
        q_head=q.stride(1),
        out_row=out.stride(0),
        out_head=out.stride(1),
        kv=kv_cache.data_ptr(),
        kv_page=kv_cache.stride(0),
        kv_head=kv_cache.stride(1),
        requests=native_requests,
        policies=_native_policies(table)
        if tiles_in is None
        else _listed_policies(table, tiles_in.tile_sizes, listed),
        num_requests=len(requests),
        num_heads=num_heads,
        num_kv_heads=kv_cache.shape[1],
        head_dim=q.shape[2],
        page_size=kv_cache.shape[2],
        dtype=_DTYPE[str(q.dtype).removeprefix("torch.")],
        layout=_LAYOUT[kv_layout],
        scale=scale,
        list_indptr=tiles_in.indptr.data_ptr() if tiles_in is not None else None,
        list_tiles=tiles_in.tiles.data_ptr() if tiles_in is not None else None,
        tiles_computed=computed,
        tiles_causal=causal,
        pack_seconds=ctypes.pointer(pack),
        select_seconds=ctypes.pointer(select),
        attend_seconds=ctypes.pointer(attend),
        tiles_out=tiles_out.data_ptr() if tiles_out is not None else None,
    )
    if _library().vsb_forward(active_isa().encode(), ctypes.byref(problem)):
        raise MemoryError(f"no memory for sparse attention over {max(lengths)} tokens")
    return list(computed), list(causal), pack.value, select.value, attend.value
