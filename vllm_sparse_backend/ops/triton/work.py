"""One step's work for the kernels: which q blocks and which keys, planned on the host.

Made once per step and used by every layer, so that a layer costs no copy to the device and no
wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.tiles import SUBTILE, causal_tiles, q_blocks
from vllm_sparse_backend.ops.triton.launch import KEY_CHUNK

SLOT_ROWS: Final = 16  # scored query rows of one program, for each q head of a group
BLOCK_SLOTS: Final = 4  # of them in a whole q block
WORD_KEYS: Final = 512  # keys whose subtiles are the bits of a word


@dataclass(frozen=True, eq=False)
class Work:
    """The q blocks of a step, and the keys before them, for the device.

    All int32, with a row per q block (largest context first), per KEY_CHUNK keys, and per request
    that is computed (its span of chunks). A request's keys are quantized into slots of their own,
    from a multiple of WORD_KEYS, so that a scan by words needs no mask.
    """

    # [B, 8]: request, aligned start, first present position, one past the last, query row of
    # `first`, context, first slot, span
    blocks: torch.Tensor
    chunks: torch.Tensor  # [C, 8]: request, first key, context, slot, span, and nothing
    spans: torch.Tensor  # [R', 4]: first chunk, number of them, context, and nothing
    key_slots: int
    subtiles: int  # most causal subtiles of any q block
    lengths: tuple[tuple[int, int], ...]  # query length and context of each request
    edges: npt.NDArray[np.int32]  # `blocks` on the host
    _slots: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def slots(self, tail: int, most: int) -> torch.Tensor:
        """Which rows are scored by which program: int32 [N, 3] of (q block, slot, whole).

        A whole q block that ends before the last ``tail`` tokens has ``most`` slots of sampled
        rows. In any other, which rows are scored is not a pattern, and each has its place in one
        of ``BLOCK_SLOTS``.
        """
        key = tail, most
        if key not in self._slots:
            _, start, first, end, _, context = self.edges[:, :6].T
            whole = (first == start) & (end == start + SLOT_ROWS * BLOCK_SLOTS)
            whole &= end <= context - tail
            counts = np.where(whole, most, BLOCK_SLOTS)
            block = np.repeat(np.arange(len(counts)), counts)
            slot = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
            rows = np.stack([block, slot, np.repeat(whole, counts)], 1)
            self._slots[key] = to_device(rows, self.blocks.device)
        return self._slots[key]

    def causal(self, table: PolicyTable) -> list[int]:
        """The causal tiles of each q head, in its own tile size."""
        ends = self.edges[:, 3]  # as an array: every layer asks, in every step
        by_size = {size: int((-(-ends // size)).sum()) for size in set(table.tile_sizes)}
        return [by_size[size] for size in table.tile_sizes]


def plan_work(
    starts: npt.NDArray[np.integer[Any]],
    seq_lens: npt.NDArray[np.integer[Any]],
    requests: Sequence[int],
    device: torch.device | str,
) -> Work:
    """The work of those ``requests`` of a batch of R, none of it waiting for the device.

    ``starts`` [R + 1]: first query row of each; ``seq_lens`` [R]: the context of each, its query
    tokens included. Both on the host. Raises ValueError where none of the requests has rows.
    """
    device = torch.device(device)
    blocks: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    spans: list[tuple[int, ...]] = []
    lengths: list[tuple[int, int]] = []
    slot = 0
    for r in requests:
        row, context = int(starts[r]), int(seq_lens[r])
        length = int(starts[r + 1]) - row
        if length == 0:
            continue
        begin = context - length
        span = len(spans)
        blocks += [
            (r, b.start, b.first, b.end, row + b.first - begin, context, slot, span)
            for b in q_blocks(length, context)
        ]
        own = -(-context // WORD_KEYS) * WORD_KEYS
        spans.append((len(chunks), own // KEY_CHUNK, context, 0))
        chunks += [(r, key, context, slot + key, span, 0, 0, 0) for key in range(0, own, KEY_CHUNK)]
        lengths.append((length, context))
        slot += own
    if not blocks:
        raise ValueError(f"requests: want at least one with query rows, got {list(requests)}")
    # Programs start in this order: the last ones to start should be the short ones.
    edges = np.array(sorted(blocks, key=lambda block: -block[3]), np.int32)
    return Work(
        blocks=to_device(edges, device),
        chunks=to_device(np.array(chunks), device),
        spans=to_device(np.array(spans), device),
        key_slots=slot,
        subtiles=causal_tiles(int(edges[0, 3]), SUBTILE),
        lengths=tuple(lengths),
        edges=edges,
    )


def plan_works(
    starts: npt.NDArray[np.integer[Any]],
    seq_lens: npt.NDArray[np.integer[Any]],
    requests: Sequence[int],
    device: torch.device | str,
    most_keys: int,
) -> list[Work]:
    """The same in parts, each of as many requests as have ``most_keys`` of context together.

    One after the other they take no more memory than `workspace` says for so many keys, however
    many long prompts a step goes on with; a single longer one is a part of its own.
    """
    parts: list[list[int]] = []
    room = 0
    for r in requests:
        keys = int(seq_lens[r])
        if not parts or keys > room:
            parts.append([])
            room = most_keys
        parts[-1].append(r)
        room -= keys
    return [plan_work(starts, seq_lens, part, device) for part in parts]


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """As an int32 tensor there, without a wait: copies from pinned memory are asynchronous."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
