"""A layer's policies as the kernels read them: one row of numbers per q head, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import torch

from vllm_sparse_backend.ops.policies import PolicyTable, tile_size
from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE
from vllm_sparse_backend.ops.triton.work import SLOT_ROWS, to_device
from vllm_sparse_backend.selection import (
    AnyPolicy,
    Bits,
    Dense,
    ListSelector,
    Mass,
    Sale,
    Static,
    keeps_all,
)

CODES: Final[dict[Bits, int]] = {4: 4, 6: 6, 8: 8, "fp4": 14}  # to the kernels


class Kind(IntEnum):
    """What the kernels tell selectors apart by."""

    ALL = 0
    STATIC = 1
    SALE = 2
    MASS = 3
    LISTED = 4  # bits that were set before, by list selectors


@dataclass(frozen=True, eq=False)
class HeadTable:
    """The rows of a layer's heads, and what the launches depend on."""

    # int32 [Hq, 8]: kind, end of the sink, local, tile, scored rows, tail, dense below, bits
    ints: torch.Tensor
    floats: torch.Tensor  # fp32 [Hq, 4]: tau, tau_slope, growth in 1/65536, and nothing
    kinds: frozenset[Kind]
    wide: bool  # some head sums the mass of more than a subtile
    bits: tuple[Bits, ...]  # of heads that score, distinct
    tail: int  # the longest of any head that scores
    slots: int  # of SLOT_ROWS scored rows in a whole q block, the most of any head

    @property
    def has_bits(self) -> bool:
        """Whether some head's tiles are bits of the mask."""
        return bool(self.bits) or Kind.LISTED in self.kinds


def heads_of(table: PolicyTable, device: torch.device) -> HeadTable:
    """The table's rows on ``device``, made at its first use there."""
    made = table.device_rows.get(device)
    if made is None:
        made = table.device_rows[device] = _make(table, device)
    assert isinstance(made, HeadTable)
    return made


def _make(table: PolicyTable, device: torch.device) -> HeadTable:
    kinds = [_kind(policy) for policy in table.rows]
    pairs = list(zip(kinds, table.rows, table.dense_below, strict=True))
    scored = [policy for policy in table.rows if isinstance(policy, Sale | Mass)]
    scored = [policy for policy in scored if not keeps_all(policy)]
    return HeadTable(
        ints=to_device([_ints(*pair) for pair in pairs], device),
        floats=to_device([_floats(policy) for policy in table.rows], device, np.float32),
        kinds=frozenset(kinds),
        wide=any(isinstance(policy, Mass) and policy.tile > SUBTILE for policy in scored),
        bits=tuple(sorted({policy.bits for policy in scored}, key=CODES.__getitem__)),
        tail=max((policy.tail for policy in scored), default=0),
        slots=max((-(-Q_BLOCK // policy.row_stride // SLOT_ROWS) for policy in scored), default=1),
    )


def _kind(policy: AnyPolicy) -> Kind:
    if keeps_all(policy):
        return Kind.ALL
    if isinstance(policy, ListSelector):
        return Kind.LISTED
    return {Static: Kind.STATIC, Sale: Kind.SALE, Mass: Kind.MASS}[type(policy)]


def _ints(kind: Kind, policy: AnyPolicy, dense_below: int) -> list[int]:
    tile = tile_size(policy)
    row = [kind, 0, 0, tile, 0, 0, dense_below, 0]
    if not isinstance(policy, Dense):
        row[1:3] = [-(-policy.sink // tile) * tile, policy.local]
    if isinstance(policy, Sale | Mass):
        row[4:6] = [Q_BLOCK // policy.row_stride, policy.tail]
        row[7] = CODES[policy.bits]
    return row


def _floats(policy: AnyPolicy) -> list[float]:
    tau, slope = (policy.tau, policy.tau_slope) if isinstance(policy, Sale | Mass) else (0.0, 0.0)
    return [tau, slope, 0.0 if isinstance(policy, Dense) else float(policy.growth_units), 0.0]
