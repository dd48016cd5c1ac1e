"""Keys as integers: their mean, and codes about it, of the whole context of each request.

(`do_not_specialize`: a number that changes from step to step must not compile a kernel anew.)

Codes and steps are those of `selection.estimate.quantize_keys`: groups of 16 keys share a step.
4-bit floats lie two in a byte where they are multiplied as such, else each as an integer.
Made anew in each step unless they are `kept`: the mean moves with the context.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse_backend.ops.triton.heads import CODES

FP4 = tl.constexpr(CODES["fp4"])
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, half to even


@triton.jit
def round_codes(x, amax, limit: tl.constexpr, BITS: tl.constexpr):
    """Codes of at most ``limit`` for ``x``, whose largest magnitude is ``amax``, as int8."""
    inverse = tl.where(amax == 0, 0.0, tl.div_rn(limit, tl.where(amax == 0, 1.0, amax)))
    scaled = x * inverse
    scaled = tl.where(scaled == scaled, scaled, 0.0)  # an input that is not finite
    if BITS == FP4:  # between powers of two there are two codes
        size = tl.abs(scaled)
        unit = tl.where(size >= 8.0, 4.0, tl.where(size >= 4.0, 2.0, 1.0))
        per_unit = tl.where(size >= 8.0, 0.25, tl.where(size >= 4.0, 0.5, 1.0))
        rounded = ((scaled * per_unit + ROUND) - ROUND) * unit
    else:
        rounded = (scaled + ROUND) - ROUND
    return tl.clamp(rounded, -limit, limit).to(tl.int8)


@triton.jit
def pack_codes(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """4-bit floats, int8 [ROWS, WIDTH], as E2M1, uint8 [ROWS, WIDTH / 2]: even channels low."""
    code = codes.to(tl.int32)
    size = tl.abs(code)
    magnitude = tl.where(size <= 4, size, tl.where(size <= 8, size // 2 + 2, 7))
    nibble = magnitude | tl.where(code < 0, 8, 0)
    low, high = tl.split(tl.reshape(nibble, [ROWS, WIDTH // 2, 2]))
    return (low | high << 4).to(tl.uint8)


@triton.jit
def store_codes(
    out, row, codes,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """``codes``, int8 [ROWS, BLOCK_D], into the rows ``row`` [ROWS] of ``out``."""
    if PACKED:
        byte = tl.arange(0, BLOCK_D // 2)
        packed = pack_codes(codes, ROWS, BLOCK_D)
        at = out + row[:, None] * (D // 2) + byte[None, :]
        tl.store(at, packed, mask=(byte < D // 2)[None, :])
    else:
        channel = tl.arange(0, BLOCK_D)
        tl.store(out + row[:, None] * D + channel[None, :], codes, mask=(channel < D)[None, :])


@triton.jit
def step_of(amax, bad, limit: tl.constexpr):
    """The unit of such integers; NaN, which no comparison drops, where an input was not finite."""
    return tl.where(bad == 0, tl.div_rn(amax, limit), float("nan"))


@triton.jit
def load_keys(
    cache, pages, first, context, head,
    stride_block, stride_head, stride_token,
    PAGE: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """KEYS keys of one kv head from position ``first``, fp32 [KEYS, BLOCK_D], zero where none."""
    position = first + tl.arange(0, KEYS)
    channel = tl.arange(0, BLOCK_D)
    here = position < context
    page = tl.load(pages + position // PAGE, mask=here, other=0).to(tl.int64)
    row = page * stride_block + head * stride_head + (position % PAGE) * stride_token
    mask = here[:, None] & (channel < D)[None, :]
    return tl.load(cache + row[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["block_table"])
def sum_keys(
    cache, block_table, chunks, sums,
    stride_block, stride_head, stride_token, stride_table,
    PAGE: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the sum of a chunk's keys of one kv head, into fp32 ``sums`` [C, Hkv, D]."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    request = tl.load(chunks + chunk * 8).to(tl.int64)
    first, context = tl.load(chunks + chunk * 8 + 1), tl.load(chunks + chunk * 8 + 2)
    keys = load_keys(
        cache, block_table + request * stride_table, first, context, head,
        stride_block, stride_head, stride_token, PAGE, KEYS, D, BLOCK_D,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    out = sums + (chunk * tl.num_programs(1) + head) * D + channel
    tl.store(out, tl.sum(keys, 0), mask=channel < D)


@triton.jit
def mean_keys(sums, wanted, means, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: one mean key of one kv head, into its place in fp32 ``means`` [N, Hkv, D].

    The chunks' sums are added in float64: a code that lies on a half should not hang on the order.
    ROWS of them at a time, since one program waits for all of them.
    """
    at, head = wanted + tl.program_id(0).to(tl.int64) * 4, tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    first, place = tl.load(at).to(tl.int64), tl.load(at + 3).to(tl.int64)
    count, keys = tl.load(at + 1), tl.load(at + 2)
    channel = tl.arange(0, BLOCK_D)
    wide = (channel < D)[None, :]
    total = tl.zeros([BLOCK_D], tl.float64)
    for i in range(0, count, ROWS):
        row = i + tl.arange(0, ROWS)
        of = sums + ((first + row) * heads + head)[:, None] * D + channel[None, :]
        part = tl.load(of, mask=(row < count)[:, None] & wide, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    mean = (total / keys).to(tl.float32)
    tl.store(means + (place * heads + head) * D + channel, mean, mask=channel < D)


@triton.jit(
    do_not_specialize=["key_slots", "stride_table"],
    do_not_specialize_on_alignment=["block_table"],
)
def code_keys(
    cache, block_table, chunks, means, codes, steps, key_slots,
    stride_block, stride_head, stride_token, stride_table,
    PAGE: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BITS: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One program: the codes of a chunk's keys of one kv head.

    Into ``codes``, int8 [Hkv, key_slots, D] or PACKED uint8 [Hkv, key_slots, D / 2], and fp32
    ``steps`` [Hkv, key_slots / 16].
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    request = tl.load(chunks + chunk * 8).to(tl.int64)
    first, context = tl.load(chunks + chunk * 8 + 1), tl.load(chunks + chunk * 8 + 2)
    slot = tl.load(chunks + chunk * 8 + 3).to(tl.int64)
    place = tl.load(chunks + chunk * 8 + 4).to(tl.int64)
    keys = load_keys(
        cache, block_table + request * stride_table, first, context, head,
        stride_block, stride_head, stride_token, PAGE, KEYS, D, BLOCK_D,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_D)
    mean = tl.load(
        means + (place * tl.num_programs(1) + head) * D + channel, mask=channel < D, other=0.0
    )
    here = (first + tl.arange(0, KEYS)) < context
    x = tl.where(here[:, None], keys - mean[None, :], 0.0)
    groups = tl.reshape(x, [KEYS // 16, 16, BLOCK_D])
    size = tl.abs(groups)
    amax = tl.max(tl.max(size, 2), 1)  # [groups]
    bad = tl.max(tl.max(tl.where(size < float("inf"), 0, 1), 2), 1)
    made = tl.reshape(round_codes(groups, amax[:, None, None], LIMIT, BITS), [KEYS, BLOCK_D])
    row = head * key_slots + slot + tl.arange(0, KEYS)
    store_codes(codes, row, made, KEYS, D, BLOCK_D, PACKED)
    group = head * (key_slots // 16) + slot // 16 + tl.arange(0, KEYS // 16)
    tl.store(steps + group, step_of(amax, bad, LIMIT))
