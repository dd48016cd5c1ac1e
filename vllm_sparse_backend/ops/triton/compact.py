"""From the bits of scored or listed subtiles to each q block's list of those that are computed."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse_backend.ops.triton.score import ALL, SALE, local_start


@triton.jit(do_not_specialize=["first_block", "words", "capacity"])
def compact_tiles(
    mask, blocks, ints, floats, lists, counts, tiles,
    first_block, words, capacity,
    HEADS: tl.constexpr, SUBTILES: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """One program: the list of one q block and q head, whole tiles, ascending.

    Reads int32 ``mask`` [B, Hq, words]; writes the 16-key subtiles into int32 ``lists``
    [b, Hq, capacity], how many into ``counts`` [b, Hq], b counted from ``first_block``, and adds
    the number of tiles, in the head's own size, to int64 ``tiles`` [Hq]. The lists are a CSR whose
    rows begin every ``capacity`` entries: where they really begin would have to be waited for.
    """
    here, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = first_block + here
    start, end = tl.load(blocks + block * 8 + 1), tl.load(blocks + block * 8 + 3)
    context = tl.load(blocks + block * 8 + 5)
    kind, sink = tl.load(ints + head * 8), tl.load(ints + head * 8 + 1)
    local, tile = tl.load(ints + head * 8 + 2), tl.load(ints + head * 8 + 3)
    kind = tl.where(context < tl.load(ints + head * 8 + 6), ALL, kind)
    growth = tl.load(floats + head * 4 + 2)
    begin = tl.where(kind == ALL, 0, local_start(start, local, growth, tile))

    row = here * HEADS + head
    out = lists + row * capacity
    size = tile // 16  # 1, 2 or 4, all of whose quotients and remainders are bits
    kept = 0
    for first in range(0, tl.cdiv(end, 16), SUBTILES):
        subtile = first + tl.arange(0, SUBTILES)
        leader = subtile & -size  # the first of its tile
        key = leader * 16
        keep = (key < sink) | (key >= begin)
        if SCORED:
            if kind >= SALE:
                at = mask + (block * HEADS + head) * words + (subtile >> 5)
                word = tl.load(at, mask=subtile < words * 32, other=0)
                # A tile's subtiles lie in one word.
                tile_bits = ((1 << size) - 1) << (leader & 31)
                keep |= (word & tile_bits) != 0
        keep &= subtile * 16 < end
        number = keep.to(tl.int32)
        place = tl.cumsum(number, 0)
        tl.store(out + kept + place - 1, subtile, mask=keep)
        kept += tl.max(place, 0)
    tl.store(counts + row, kept)
    # Tiles are kept whole, but for the last one, which the sequence's end may cut.
    tl.atomic_add(tiles + head, tl.cast(tl.cdiv(kept, size), tl.int64))
