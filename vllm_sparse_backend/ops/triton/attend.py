"""Block-sparse attention: an online softmax over the keys of a list of subtiles.

Subtiles of 16 keys are gathered into products of BLOCK_N, so that small tiles cost no more than
large ones, and pages need not lie in any order. The next product's indices and pages are carried
through the loop: with a list that is only read when it is needed, nothing could be fetched ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse_backend.ops.triton.score import LOG2_E


@triton.jit
def _update(
    best, total, acc, q, cache_rows, key, position, end, count, offset, unit, channel,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over one product's keys. ``unit``: scale in units of log2.

    Of fp32 the products are exact ("ieee"), of 16 bits they are either way.
    """
    if BLOCK_D == D or REPEAT:
        k = tl.load(cache_rows[:, None] + channel[None, :])  # [N, D]
    else:
        k = tl.load(cache_rows[:, None] + channel[None, :], mask=(channel < D)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if MASKED:
        real = offset + tl.arange(0, BLOCK_N) // 16 < count
        s = tl.where(real[None, :] & (key[None, :] <= position[:, None]), s, float("-inf"))
    higher = tl.maximum(best, tl.max(s, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = tl.exp2(s * unit - (safe * unit)[:, None])
    shrink = tl.exp2((best - safe) * unit)
    v_at = cache_rows[:, None] + D + channel[None, :]  # [N, D]
    if MASKED:
        # Behind the sequence's end a page holds anything, and 0 times a NaN is none.
        v = tl.load(v_at, mask=(channel < D)[None, :] & (key < end)[:, None], other=0.0)
    elif BLOCK_D == D or REPEAT:
        v = tl.load(v_at)
    else:
        v = tl.load(v_at, mask=(channel < D)[None, :], other=0.0)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _place(list_at, pages, offset, count, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one product's keys, from entry ``offset`` of the list: their positions, and their places
    in the cache, counted in tokens. One int32 a key is what the loop carries."""
    lane = tl.arange(0, BLOCK_N)
    entry = offset + lane // 16
    key = tl.load(list_at + entry, mask=entry < count, other=0) * 16 + lane % 16
    at = key.to(tl.uint32)  # unsigned: divided by a shift alone
    return key, tl.load(pages + at // PAGE).to(tl.uint32) * PAGE + at % PAGE


@triton.jit
def _offset(place, stride_block, stride_token, PAGE: tl.constexpr):
    """The elements from the cache's start to a place in it, int64."""
    return (place // PAGE).to(tl.int64) * stride_block + place % PAGE * stride_token


@triton.jit(
    do_not_specialize=["first_block", "capacity", "stride_table"],
    do_not_specialize_on_alignment=["block_table"],
)
def attend_tiles(
    q, cache, block_table, blocks, lists, counts, out,
    scale, first_block, capacity,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head,
    stride_block, stride_head, stride_token, stride_table,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """One program: one q block of 64 rows of one q head, over its own list.

    ``lists`` int32 [b, Hq, capacity] and ``counts`` [b, Hq] as `compact_tiles` leaves them; b
    counts from ``first_block``. The list's last subtiles are the diagonal ones, and only in them,
    and in what is left over of the last whole product, does any key have to be masked. REPEAT: the
    last BLOCK_D - D channels are read once more, in place of a mask over as many that pad them.
    """
    here, head = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    at = blocks + (first_block + here) * 8
    request = tl.load(at).to(tl.int64)
    start, first, end = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    query_row = tl.load(at + 4)
    row = here * HEADS + head
    list_at = lists + row * capacity
    count = tl.load(counts + row)
    N: tl.constexpr = BLOCK_N // 16
    whole = (count - (tl.cdiv(end, 16) - start // 16)) // N  # products without a mask

    position = start + tl.arange(0, 64)
    channel = tl.arange(0, BLOCK_D)
    read = channel
    if REPEAT:
        read = tl.where(channel < D, channel, channel - (BLOCK_D - D))
        read = tl.max_contiguous(tl.multiple_of(read, 8), 8)
    present = (position >= first) & (position < end)
    wide = present[:, None] & (channel < D)[None, :]
    row_at = (query_row + position - first).to(tl.int64)
    queries = tl.load(
        q + (row_at * stride_q_token + head * stride_q_head)[:, None] + read[None, :],
        mask=present[:, None] if REPEAT else wide, other=0.0,
    )  # fmt: skip
    if REPEAT:  # what is read twice counts half each time; a zero would make of a key's inf a NaN
        part = tl.where(read < 2 * D - BLOCK_D, 1.0, 0.5)
        queries = (queries * part[None, :]).to(queries.dtype)
    unit = scale * LOG2_E

    pages = block_table + request * stride_table
    cache_head = cache + head // GROUP * stride_head
    best = tl.full([64], float("-inf"), tl.float32)
    total = tl.zeros([64], tl.float32)
    acc = tl.zeros([64, BLOCK_D], tl.float32)
    key, place = _place(list_at, pages, 0, count, PAGE, BLOCK_N)
    for i in range(whole):
        rows = cache_head + _offset(place, stride_block, stride_token, PAGE)
        _, place = _place(list_at, pages, (i + 1) * N, count, PAGE, BLOCK_N)
        best, total, acc = _update(
            best, total, acc, queries, rows, key, position, end, count, i * N, unit, read,
            D, BLOCK_D, BLOCK_N, REPEAT, False,
        )  # fmt: skip
    for i in range(whole, tl.cdiv(count, N)):
        key, place = _place(list_at, pages, i * N, count, PAGE, BLOCK_N)
        rows = cache_head + _offset(place, stride_block, stride_token, PAGE)
        best, total, acc = _update(
            best, total, acc, queries, rows, key, position, end, count, i * N, unit, read,
            D, BLOCK_D, BLOCK_N, REPEAT, True,
        )  # fmt: skip
    acc = acc / total[:, None]
    out_at = out + (row_at * stride_out_token + head * stride_out_head)[:, None] + channel[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=wide)
