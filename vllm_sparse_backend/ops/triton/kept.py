"""Codes that outlive a step, so that each of a prompt's keys is quantized once and not per chunk.

They belong to a request, lie in the order of its positions and are about a mean that stands still:
that of its first 2^n keys, the largest such number its context holds. When that doubles all codes
are made anew, which comes to three codes a key at most, however small a prompt's chunks are. They
do not belong to the cache's blocks: a block may be shared, or another's tomorrow, while what a
running request has computed of its prompt stays as it is until it is preempted or done.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from vllm_sparse_backend.ops.triton.launch import KEY_CHUNK, WORD_KEYS, architecture, packs
from vllm_sparse_backend.selection import Bits

PATIENCE: Final = 64  # steps for which a place waits for its request to go on


class Codes(NamedTuple):
    """Keys' codes, of one number of bits; see `keys`."""

    means: torch.Tensor  # fp32 [N, Hkv, D]
    ints: torch.Tensor  # int8 [Hkv, slots, D]; uint8 [Hkv, slots, D / 2] where they are packed
    steps: torch.Tensor  # fp32 [Hkv, slots / 16]

    @classmethod
    def empty(
        cls,
        packed: bool,
        means: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        device: torch.device,
    ) -> Codes:
        """Room for ``means`` mean keys and the codes of ``slots`` keys."""
        width, dtype = (head_dim // 2, torch.uint8) if packed else (head_dim, torch.int8)
        return cls(
            torch.empty((means, kv_heads, head_dim), dtype=torch.float32, device=device),
            torch.empty((kv_heads, slots, width), dtype=dtype, device=device),
            torch.empty((kv_heads, slots // 16), dtype=torch.float32, device=device),
        )

    @property
    def packed(self) -> bool:
        """Whether two codes are in a byte."""
        return self.ints.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(x.nbytes for x in self)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one request's codes are, in one step."""

    stream: int
    slot: int  # the stream's first
    have: int  # keys, a multiple of KEY_CHUNK, whose codes are there already
    mean_of: int  # keys
    new_mean: bool


@dataclass(slots=True)
class _Holder:
    stream: int
    keys: int = 0
    mean_of: int = 0
    seen: int = 0  # step


class Shelf:
    """Which requests' codes are kept, decided on the host from lengths alone.

    ``streams`` requests of up to ``keys`` tokens at a time. Once per step `step`, then `place` for
    each request of it that is computed by the kernels.
    """

    def __init__(self, streams: int, keys: int) -> None:
        self._capacity = capacity_of(keys)
        self._holders: dict[int, _Holder] = {}
        self._used = [-1] * streams  # the step in which a stream was last given
        self._step = 0

    def step(self) -> None:
        """Another step begins."""
        self._step += 1

    def place(self, request: int, computed: int, context: int, prompt: int) -> Place | None:
        """Where ``request`` (a number that no other has, nor has had) has its codes.

        ``computed`` of its ``context`` tokens were so before this step. None: nowhere, since no
        chunk follows or all places are taken; its keys are then quantized for this step alone.
        """
        last = context >= prompt
        holder = self._holders.get(request)
        if holder is None:
            stream = None if last else self._free()
            if stream is None:
                return None
            holder = self._holders[request] = _Holder(stream)
        mean_of = 1 << (context.bit_length() - 1)
        # Less than there was: it was preempted, and what it computes anew need not be the same.
        anew = mean_of != holder.mean_of or computed < holder.keys
        have = 0 if anew else holder.keys // KEY_CHUNK * KEY_CHUNK
        holder.keys, holder.mean_of, holder.seen = context, mean_of, self._step
        self._used[holder.stream] = self._step
        if last:
            del self._holders[request]
        return Place(holder.stream, holder.stream * self._capacity, have, mean_of, anew)

    def _free(self) -> int | None:
        """A stream that nobody holds, or nobody has come back to; not one of this very step."""
        for request, holder in list(self._holders.items()):
            if self._step - holder.seen > PATIENCE:  # aborted, or preempted for long
                del self._holders[request]
        held = {holder.stream for holder in self._holders.values()}
        free = (s for s, used in enumerate(self._used) if s not in held and used < self._step)
        return next(free, None)


def capacity_of(keys: int) -> int:
    """The slots of a stream for contexts of up to ``keys`` tokens."""
    return -(-keys // WORD_KEYS) * WORD_KEYS


def kept_bytes(streams: int, keys: int, kv_heads: int, head_dim: int) -> int:
    """The most that `KeptCodes` of one number of bits take."""
    slots = streams * capacity_of(keys)
    return kv_heads * (slots * head_dim + slots // 16 * 4 + streams * head_dim * 4)


class KeptCodes:
    """The codes of one layer, on the device, for each number of bits that its heads ask for.

    ``streams`` requests of up to ``keys`` tokens.
    """

    def __init__(
        self,
        streams: int,
        keys: int,
        kv_heads: int,
        head_dim: int,
        bits: Iterable[Bits],
        device: torch.device,
    ) -> None:
        slots = streams * capacity_of(keys)
        shape = streams, kv_heads, slots, head_dim
        self.by_bits = {
            kind: Codes.empty(packs(architecture(), kind), *shape, device) for kind in bits
        }

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(codes.nbytes for codes in self.by_bits.values())
