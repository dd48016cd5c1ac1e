"""One step's work for the kernels: which q blocks and which keys, planned on the host.

Made once per step and used by every layer, so that a layer costs no copy to the device and no
wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.tiles import SUBTILE, causal_tiles, q_blocks
from vllm_sparse_backend.ops.triton.kept import Place
from vllm_sparse_backend.ops.triton.launch import KEY_CHUNK, WORD_KEYS

SLOT_ROWS: Final = 16  # scored query rows of one program, for each q head of a group
BLOCK_SLOTS: Final = 4  # of them in a whole q block


class Share(NamedTuple):
    """One request's part of a step's work."""

    request: int
    rows: slice  # of the queries
    context: int
    prompt: int
    blocks: torch.Tensor  # int64 [N] on the device: its q blocks' rows of `Work.blocks`, ascending


@dataclass(frozen=True, eq=False)
class Work:
    """The q blocks of a step, and the keys before them, for the device.

    All int32, with a row per q block (largest context first), per KEY_CHUNK keys, and per request
    that is computed (its span). A request's keys are quantized into slots of their own, from a
    multiple of WORD_KEYS, so that a scan by words needs no mask: slots of this step alone, or
    those in which its codes are ``kept``; then only what is not there yet is in the lists.
    """

    # [B, 8]: request, aligned start, first present position, one past the last, query row of
    # `first`, context, first slot, span
    blocks: torch.Tensor
    chunks: torch.Tensor  # [C, 8]: request, first key, context, slot, which mean, and nothing
    summed: torch.Tensor  # [C', 8]: chunks to be summed for a mean, of a context of so many keys
    means: torch.Tensor  # [N, 4]: first of `summed`, number of them, keys, which mean
    spans: torch.Tensor  # [R', 2]: which mean, length of the prompt
    kept: bool
    subtiles: int  # most causal subtiles of any q block
    lengths: tuple[tuple[int, int], ...]  # query length and context of each request
    edges: npt.NDArray[np.int32]  # `blocks` on the host
    prompts: npt.NDArray[np.int32]  # of each request that is computed
    _slots: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    _shares: list[Share] = field(default_factory=list)

    def slots(self, tail: int, most: int, together: int = 1) -> torch.Tensor:
        """Which rows are scored by which program: int32 [N, 3] of (q block, slot, whole).

        A whole q block that ends before the last ``tail`` tokens of its prompt has ``most`` slots
        of sampled rows. In any other, which rows are scored is not a pattern, and each has its
        place in one of ``BLOCK_SLOTS``. N is a multiple of ``together``, and so many neighbours
        are of one request; where it has not enough, its last slot is repeated.
        """
        key = tail, most, together
        if key not in self._slots:
            _, start, first, end, _, _, _, span = self.edges.T
            whole = (first == start) & (end == start + SLOT_ROWS * BLOCK_SLOTS)
            whole &= end <= self.prompts[span] - tail
            counts = np.where(whole, most, BLOCK_SLOTS)
            block = np.repeat(np.arange(len(counts)), counts)
            slot = np.arange(len(block)) - np.repeat(np.cumsum(counts) - counts, counts)
            rows = np.stack([block, slot, np.repeat(whole, counts)], 1)
            rows = _in_sets(rows, span[block], together)
            self._slots[key] = to_device(rows, self.blocks.device)
        return self._slots[key]

    def shares(self) -> list[Share]:
        """The requests that are computed, each by itself."""
        if not self._shares:
            for span, (length, context) in enumerate(self.lengths):
                # From the smallest context; copied, since torch knows no negative strides.
                own = np.flatnonzero(self.edges[:, 7] == span)[::-1].copy()
                request, row = (int(self.edges[own[0], column]) for column in (0, 4))
                places = to_device(own, self.blocks.device, np.int64)
                rows, prompt = slice(row, row + length), int(self.prompts[span])
                self._shares.append(Share(request, rows, context, prompt, places))
        return self._shares

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
    prompt_lens: npt.NDArray[np.integer[Any]] | None = None,
    places: Mapping[int, Place] | None = None,
) -> Work:
    """The work of those ``requests`` of a batch of R, none of it waiting for the device.

    ``starts`` [R + 1]: first query row of each; ``seq_lens`` [R]: the context of each, its query
    tokens included; ``prompt_lens`` [R]: the prompts of which these may be chunks, from whose ends
    policies' ``tail`` counts, ``seq_lens`` unless given. All on the host. ``places``: where each of
    the requests' codes are kept. Raises ValueError where none of the requests has rows.
    """
    device = torch.device(device)
    blocks: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    summed: list[tuple[int, ...]] = []
    means: list[tuple[int, ...]] = []
    spans: list[tuple[int, ...]] = []
    lengths: list[tuple[int, int]] = []
    slots = 0
    for r in requests:
        row, context = int(starts[r]), int(seq_lens[r])
        length = int(starts[r + 1]) - row
        if length == 0:
            continue
        begin, span = context - length, len(spans)
        own = -(-context // WORD_KEYS) * WORD_KEYS
        place = Place(span, slots, 0, context, True) if places is None else places[r]
        slots += own
        blocks += [
            (r, b.start, b.first, b.end, row + b.first - begin, context, place.slot, span)
            for b in q_blocks(length, context)
        ]
        chunks += [
            (r, key, context, place.slot + key, place.stream, 0, 0, 0)
            for key in range(place.have, own, KEY_CHUNK)
        ]
        if place.new_mean:
            edges = range(0, place.mean_of, KEY_CHUNK)
            means.append((len(summed), len(edges), place.mean_of, place.stream))
            summed += [(r, key, place.mean_of, 0, 0, 0, 0, 0) for key in edges]
        spans.append((place.stream, context if prompt_lens is None else int(prompt_lens[r])))
        lengths.append((length, context))
    if not blocks:
        raise ValueError(f"requests: want at least one with query rows, got {list(requests)}")
    # Programs start in this order: the last ones to start should be the short ones.
    sorted_blocks = np.array(sorted(blocks, key=lambda block: -block[3]), np.int32)
    return Work(
        blocks=to_device(sorted_blocks, device),
        chunks=to_device(np.array(chunks), device),
        summed=to_device(np.array(summed).reshape(-1, 8), device),
        means=to_device(np.array(means).reshape(-1, 4), device),
        spans=to_device(np.array(spans), device),
        kept=places is not None,
        subtiles=causal_tiles(int(sorted_blocks[0, 3]), SUBTILE),
        lengths=tuple(lengths),
        edges=sorted_blocks,
        prompts=np.array(spans, np.int32)[:, 1],
    )


def plan_works(
    starts: npt.NDArray[np.integer[Any]],
    seq_lens: npt.NDArray[np.integer[Any]],
    requests: Sequence[int],
    device: torch.device | str,
    most_keys: int,
    prompt_lens: npt.NDArray[np.integer[Any]] | None = None,
    places: Mapping[int, Place] | None = None,
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
    return [plan_work(starts, seq_lens, part, device, prompt_lens, places) for part in parts]


def _in_sets(
    rows: npt.NDArray[np.int64], span: npt.NDArray[np.int32], together: int
) -> npt.NDArray[np.int64]:
    """``rows`` of the requests in ``span``, each request's made a multiple of ``together``."""
    if together == 1:
        return rows
    sets = []
    for request in np.unique(span):
        own = rows[span == request]
        missing = -len(own) % together
        sets.append(np.concatenate([own, np.repeat(own[-1:], missing, 0)]))
    whole = np.concatenate(sets).reshape(-1, together, rows.shape[1])
    # By their first q block: the ones that start last should be the short ones, as elsewhere.
    return whole[np.argsort(whole[:, 0, 0], kind="stable")].reshape(-1, rows.shape[1])


def to_device(
    array: npt.ArrayLike, device: torch.device, dtype: npt.DTypeLike = np.int32
) -> torch.Tensor:
    """As a tensor there, without a wait: copies from pinned memory are asynchronous."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
