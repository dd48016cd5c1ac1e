"""The launches of one layer, in order, on one stream and without a wait for the device, but for
what its list selectors wait for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch

from vllm_sparse_backend.ops.policies import PolicyTable
from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE
from vllm_sparse_backend.ops.triton import attend, compact, keys, listed, score
from vllm_sparse_backend.ops.triton.clock import Clock
from vllm_sparse_backend.ops.triton.heads import CODES, HeadTable, Kind, heads_of
from vllm_sparse_backend.ops.triton.kept import Codes, KeptCodes, capacity_of
from vllm_sparse_backend.ops.triton.launch import (
    KEY_CHUNK,
    MOST_TOGETHER,
    WORD_KEYS,
    Launch,
    Shape,
    architecture,
    launch,
    packs,
    padded,
)
from vllm_sparse_backend.ops.triton.work import BLOCK_SLOTS, SLOT_ROWS, Work
from vllm_sparse_backend.selection import Bits
from vllm_sparse_backend.selection.estimate import KEY_CODES, QUERY_CODES

SUMS_AT_ONCE: Final = 32  # of 128 keys each, in one `mean_keys` program
LIST_BYTES: Final = 64 << 20  # of tile lists at a time; more q blocks go one wave after the other


@dataclass(frozen=True, eq=False)
class Call:
    """One layer of one step: the tensors, and what follows from their shapes."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    work: Work
    heads: HeadTable
    scale: float

    @property
    def num_heads(self) -> int:
        """Q heads."""
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.kv_cache.shape[1]

    @property
    def group(self) -> int:
        """Q heads per kv head."""
        return self.num_heads // self.kv_heads

    @cached_property
    def how(self) -> Launch:
        """The launches of these shapes."""
        return launch(architecture(), self.q.shape[2], self.group, self.q.dtype)

    @property
    def channels(self) -> dict[str, int]:
        """What every kernel that sees channels is compiled for."""
        return {"D": self.q.shape[2], "BLOCK_D": padded(self.q.shape[2])}

    @property
    def paged(self) -> dict[str, int]:
        """What every kernel that sees the cache is compiled for."""
        return {"PAGE": self.kv_cache.shape[2], **self.channels}

    @property
    def cache_strides(self) -> tuple[int, ...]:
        """Of blocks, kv heads and tokens in the cache, and of requests in the block table."""
        return *_strides(self.kv_cache, 3), self.block_table.stride(0)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A workspace beside the tensors."""
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def forward(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: Work,
    table: PolicyTable,
    scale: float,
    out: torch.Tensor,
    clock: Clock | None = None,
    kept: KeptCodes | None = None,
) -> torch.Tensor:
    """Sparse attention of the requests in ``work`` into their rows of ``out``.

    ``q``, ``out`` [T, Hq, D] with adjacent channels; ``kv_cache`` [num_blocks, Hkv, N, 2*D] with
    any strides but a last of 1, N a multiple of 16; ``block_table`` int32 [R, max_blocks]. Rows of
    other requests are left alone. ``clock`` is told of the phases "pack", "select" and "attend".
    ``kept``: this layer's codes, of work that was planned for them.

    Returns the tiles computed per q head, int64 [Hq], on the device; nothing waits for it. Raises
    ValueError where `launch` has no entry for the shapes, and for codes that are not the work's;
    and what list selectors raise.
    """
    call = Call(q, kv_cache, block_table, work, heads_of(table, q.device), scale)
    tiles = torch.zeros(call.num_heads, dtype=torch.int64, device=q.device)
    mask = _score(call, table, kept, clock)
    blocks, row_bytes = len(work.blocks), 4 * call.num_heads * work.subtiles
    wave = max(1, min(blocks, LIST_BYTES // row_bytes))
    for first in range(0, blocks, wave):
        _mark(clock, "select")
        lists, counts = _compact(call, mask, tiles, first, min(wave, blocks - first))
        _mark(clock, "attend")
        _attend(call, lists, counts, first, out)
    return tiles


def workspace(
    rows: int, keys: int, heads: int, kv_heads: int, head_dim: int, requests: int = 1
) -> int:
    """The most bytes that `forward` takes beside its tensors for ``rows`` query tokens of up to
    ``requests`` requests with ``keys`` tokens of context together, whatever the policies, but for
    what list selectors take.
    """
    requests = max(1, min(requests, rows, keys))
    # What begins and ends amid a q block has a share of one more; and words are of one request.
    blocks = min(rows, (rows + (Q_BLOCK - 2) * requests) // Q_BLOCK + requests)
    coded = (keys + (WORD_KEYS - 1) * requests) // WORD_KEYS
    slots, chunks, words = coded * WORD_KEYS, coded * WORD_KEYS // KEY_CHUNK, -(-keys // WORD_KEYS)
    quantized = kv_heads * (slots * (head_dim + 4 / 16) + 4 * (chunks + requests) * head_dim)
    programs = blocks * BLOCK_SLOTS + requests * (MOST_TOGETHER - 1)
    scored = programs * SLOT_ROWS * 2 * heads * (head_dim + 8)  # a share's rows, to a power of two
    lists = max(LIST_BYTES, 4 * heads * words * WORD_KEYS // SUBTILE)
    return int(quantized + scored + 4 * blocks * heads * (words + 1) + lists)


def select(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    work: Work,
    table: PolicyTable,
    scale: float,
    kept: KeptCodes | None = None,
) -> torch.Tensor:
    """The subtiles that `forward` computes, uint8 [Hq, B, subtiles] in the order of the q blocks.

    For tests and analysis, of one request: the lists of all its q blocks at once. Waits.
    """
    call = Call(q, kv_cache, block_table, work, heads_of(table, q.device), scale)
    tiles = torch.zeros(call.num_heads, dtype=torch.int64, device=q.device)
    mask = _score(call, table, kept, None)
    lists, counts = _compact(call, mask, tiles, 0, len(work.blocks))
    real = torch.arange(work.subtiles, device=q.device) < counts[..., None]
    # What a list holds behind its end is anything.
    found = torch.zeros_like(lists, dtype=torch.uint8)
    found.scatter_reduce_(2, torch.where(real, lists, 0).long(), real.byte(), "amax")
    return found[torch.argsort(work.blocks[:, 1])].transpose(0, 1)


def _mark(clock: Clock | None, phase: str) -> None:
    if clock is not None:
        clock.mark(phase)


def _strides(x: torch.Tensor, axes: int) -> tuple[int, ...]:
    """Of the first ``axes``; 0 where there is but one element: torch says anything of it, and where
    it says 1, Triton compiles anew."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in sizes)[:axes]


def _options(shape: Shape) -> dict[str, Any]:
    # Fused multiply-adds are Triton's default today, and will not be from 3.10 on.
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}


def _score(
    call: Call, table: PolicyTable, kept: KeptCodes | None, clock: Clock | None
) -> torch.Tensor:
    """The bits of tiles that are scored or listed, int32 [B, Hq, words]; see `score.score_tiles`
    and `listed.set_bits`."""
    if call.work.kept != (kept is not None):
        raise ValueError(f"kept: want codes that are kept or None as the work says, got {kept}")
    words = -(-call.work.subtiles // 32)
    mask = call.empty(len(call.work.blocks), call.num_heads, words, dtype=torch.int32).zero_()
    for bits in call.heads.bits:
        _mark(clock, "pack")
        codes = _codes(call, bits) if kept is None else kept.by_bits[bits]
        _quantize(call, bits, codes)
        _mark(clock, "select")
        _score_bits(call, bits, codes, mask)
        del codes  # before the next ones are made: `workspace` counts one set
    if Kind.LISTED in call.heads.kinds:
        _mark(clock, "select")
        paged = call.q, call.kv_cache, call.block_table
        listed.set_bits(*paged, call.work, table, call.scale, mask)
    return mask


def _codes(call: Call, bits: Bits) -> Codes:
    """Where keys' codes go, for one step."""
    slots = sum(capacity_of(context) for _, context in call.work.lengths)
    means, dim = len(call.work.spans), call.q.shape[2]
    packed = packs(architecture(), bits)
    return Codes.empty(packed, means, call.kv_heads, slots, dim, call.q.device)


def _coded(bits: Bits, codes: Codes) -> dict[str, int]:
    """What every kernel that sees codes is compiled for."""
    return {"BITS": CODES[bits], "PACKED": codes.packed}


def _quantize(call: Call, bits: Bits, codes: Codes) -> None:
    """The requests' keys into ``codes``, those of them that the work says; see `keys`."""
    work, how = call.work, call.how
    options = _options(how.keys)
    if len(work.means):
        sums = call.empty(len(work.summed), call.kv_heads, call.q.shape[2])
        keys.sum_keys[(len(work.summed), call.kv_heads)](
            call.kv_cache, call.block_table, work.summed, sums, *call.cache_strides,
            KEYS=how.keys.block, **call.paged, **options,
        )  # fmt: skip
        keys.mean_keys[(len(work.means), call.kv_heads)](
            sums, work.means, codes.means, ROWS=SUMS_AT_ONCE, **call.channels, **options
        )
    keys.code_keys[(len(work.chunks), call.kv_heads)](
        call.kv_cache, call.block_table, work.chunks, codes.means, codes.ints, codes.steps,
        codes.ints.shape[1], *call.cache_strides,
        KEYS=how.keys.block, LIMIT=KEY_CODES[bits], **_coded(bits, codes), **call.paged, **options,
    )  # fmt: skip


def _score_bits(call: Call, bits: Bits, codes: Codes, mask: torch.Tensor) -> None:
    """Set the bits of the tiles that heads with such codes score above their threshold."""
    work, heads, how = call.work, call.heads, call.how
    scoring = how.score_packed if codes.packed else how.score
    assert scoring is not None
    slots = work.slots(heads.tail, heads.slots, scoring.together)
    share_rows = SLOT_ROWS * padded(how.share)
    programs, shares, words = len(slots), call.num_heads // how.share, mask.shape[2]
    width, dtype = codes.ints.shape[2], codes.ints.dtype
    row_codes = call.empty(programs, shares, share_rows, width, dtype=dtype)
    slopes, biases = (
        call.empty(programs, shares, share_rows),
        call.empty(programs, shares, share_rows),
    )
    shared = {"GROUP": call.group, "SHARE": how.share, "SHARE_ROWS": share_rows}
    shared |= _coded(bits, codes)
    score.anchor_rows[(programs, shares)](
        call.q, call.kv_cache, call.block_table, codes.means, work.blocks, work.spans, slots,
        heads.ints, heads.floats, row_codes, slopes, biases, call.scale,
        *_strides(call.q, 2), *call.cache_strides,
        LIMIT=QUERY_CODES[bits], KEYS=how.anchor.block,
        **shared, **call.paged, **_options(how.anchor),
    )  # fmt: skip
    score.score_tiles[(programs // scoring.together, shares, -(-words // scoring.words))](
        codes.ints, codes.steps, row_codes, slopes, biases, slots, work.blocks, heads.ints,
        heads.floats, mask, codes.ints.shape[1], words,
        HEADS=call.num_heads, BLOCK_N=scoring.block, WORDS=scoring.words,
        HAS_SALE=Kind.SALE in heads.kinds, HAS_MASS=Kind.MASS in heads.kinds,
        WIDE=heads.wide, PARTS=scoring.parts, TOGETHER=scoring.together,
        **shared, **call.channels, **_options(scoring),
    )  # fmt: skip


def _compact(
    call: Call, mask: torch.Tensor, tiles: torch.Tensor, first: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists of ``count`` q blocks from the ``first``; see `compact.compact_tiles`."""
    how, heads, capacity = call.how, call.heads, call.work.subtiles
    lists = call.empty(count, call.num_heads, capacity, dtype=torch.int32)
    counts = call.empty(count, call.num_heads, dtype=torch.int32)
    compact.compact_tiles[(count, call.num_heads)](
        mask, call.work.blocks, heads.ints, heads.floats, lists, counts, tiles,
        first, mask.shape[2], capacity,
        HEADS=call.num_heads, SUBTILES=how.compact.block, SCORED=heads.has_bits,
        **_options(how.compact),
    )  # fmt: skip
    return lists, counts


def _attend(
    call: Call, lists: torch.Tensor, counts: torch.Tensor, first: int, out: torch.Tensor
) -> None:
    """Attention of the q blocks from the ``first`` over their lists, into ``out``."""
    attend.attend_tiles[(call.num_heads, len(lists))](
        call.q, call.kv_cache, call.block_table, call.work.blocks, lists, counts, out,
        call.scale, first, lists.shape[2],
        *_strides(call.q, 2), *_strides(out, 2), *call.cache_strides,
        HEADS=call.num_heads, GROUP=call.group, BLOCK_N=call.how.attend.block,
        REPEAT=call.how.attend_repeat, **call.paged, **_options(call.how.attend),
    )  # fmt: skip
