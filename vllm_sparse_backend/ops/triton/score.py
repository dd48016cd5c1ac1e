"""Scoring: for the sampled rows of a q block, which subtiles of 16 keys reach the threshold.

The rule is that of `selection.sale` and `selection.mass`. A program serves up to eight q heads that
read one kv head (SHARE of its GROUP): their scored rows make one matrix. What is left for each tile
after the integer product is a maximum (or, for `mass`, a sum of cheap exponentials) over its 16
keys, its step and a comparison: the threshold and the row's product with the mean key are in the
row's own bias, and no key needs a mask, since whatever the scan covers beyond the tiles that are to
be judged are tiles which are computed anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparse_backend.ops.triton.heads import Kind
from vllm_sparse_backend.ops.triton.keys import load_keys, round_codes, step_of, store_codes

LOG2_E = tl.constexpr(1.4426950408889634)
ONE_OCTAVE = tl.constexpr(8388608.0)  # between two powers of 2, in the bits of a float
ALL = tl.constexpr(Kind.ALL.value)
SALE = tl.constexpr(Kind.SALE.value)
MASS = tl.constexpr(Kind.MASS.value)


@triton.jit
def place_of(i, count):
    """Where in a q block the i-th of ``count`` sampled rows lies; as `estimate.scored_rows`."""
    return (i * 63 + (count - 1) // 2) // (count - 1)


@triton.jit
def local_start(start, local, growth, tile):
    """The first position of the local window's tiles before a q block."""
    local += (growth.to(tl.int64) * (start + 64) >> 16).to(tl.int32)
    return tl.maximum(start - local, 0) // tile * tile


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["block_table"])
def anchor_rows(
    q, cache, block_table, means, blocks, spans, slots, ints, floats,
    codes, slopes, biases, scale,
    stride_q_token, stride_q_head,
    stride_block, stride_head, stride_token, stride_table,
    GROUP: tl.constexpr, SHARE: tl.constexpr, SHARE_ROWS: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BITS: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: up to 16 scored rows of one q block, for SHARE q heads of one kv head.

    Their exact scores over sink and local tiles give each its maximum and sum, and these its
    threshold. Writes per row the ``codes`` [N, Hq / SHARE, M, D or D / 2], as keys' are,
    ``slopes`` (scale times the row's step) and ``biases`` (what its estimate lacks of the threshold
    at a product of 0), fp32 [N, Hq / SHARE, M]; M is 16 rows of each of SHARE_ROWS / 16 heads.
    """
    program, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_head = share * SHARE // GROUP
    block = tl.load(slots + program * 3).to(tl.int64)
    slot, whole = tl.load(slots + program * 3 + 1), tl.load(slots + program * 3 + 2)
    at = blocks + block * 8
    request = tl.load(at).to(tl.int64)
    start, first, end = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    query_row, context, span = tl.load(at + 4), tl.load(at + 5), tl.load(at + 7).to(tl.int64)
    place, prompt = tl.load(spans + span * 2).to(tl.int64), tl.load(spans + span * 2 + 1)

    row = tl.arange(0, SHARE_ROWS)
    member, lane = row // 16, row % 16
    head = share * SHARE + member
    real = member < SHARE
    of = ints + head * 8
    kind = tl.load(of, mask=real, other=0)
    sink = tl.load(of + 1, mask=real, other=0)
    local = tl.load(of + 2, mask=real, other=0)
    tile = tl.load(of + 3, mask=real, other=16)
    count = tl.maximum(tl.load(of + 4, mask=real, other=2), 2)
    tail = tl.load(of + 5, mask=real, other=0)
    least = tl.load(of + 6, mask=real, other=0)
    bits = tl.load(of + 7, mask=real, other=0)
    scores = real & (kind >= SALE) & (bits == BITS) & (context >= least)

    # Which position is this row's, and is it scored?
    i = slot * 16 + lane
    position = start + tl.where(whole != 0, place_of(i, count), i)
    sampled_i = (2 * i * (count - 1) + 63) // 126  # the sampled row that is nearest to place i
    pattern = place_of(sampled_i, count) == i
    pattern |= (position >= prompt - tail) | (position == first) | (position == end - 1)
    scored = tl.where(whole != 0, i < count, pattern)
    scored &= scores & (position >= first) & (position < end)

    channel = tl.arange(0, BLOCK_D)
    wide = (channel < D)[None, :]
    q_at = (query_row + position - first).to(tl.int64) * stride_q_token + head * stride_q_head
    rows = tl.load(
        q + q_at[:, None] + channel[None, :], mask=scored[:, None] & wide, other=0.0
    )  # [M, BLOCK_D]

    # Maximum and sum over sink and local tiles, by the online softmax.
    growth = tl.load(floats + head * 4 + 2, mask=real, other=0.0)
    begin = local_start(start, local, growth, tile)
    sink_stop = tl.minimum(tl.max(tl.where(scores, sink, 0)), end)
    local_first = tl.min(tl.where(scores, begin, end)) // KEYS * KEYS
    local_first = tl.maximum(local_first, tl.cdiv(sink_stop, KEYS) * KEYS)
    near = tl.cdiv(sink_stop, KEYS)
    far = tl.maximum(tl.cdiv(end - local_first, KEYS), 0)
    best = tl.full([SHARE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([SHARE_ROWS], tl.float32)
    pages = block_table + request * stride_table
    for step in range(near + far):
        from_key = tl.where(step < near, step * KEYS, local_first + (step - near) * KEYS)
        key = from_key + tl.arange(0, KEYS)
        k = load_keys(
            cache, pages, from_key, end, kv_head,
            stride_block, stride_head, stride_token, PAGE, KEYS, D, BLOCK_D,
        ).to(rows.dtype)  # fmt: skip
        s = scale * tl.dot(rows, tl.trans(k), input_precision="ieee")
        seen = (key[None, :] < sink[:, None]) | (key[None, :] >= begin[:, None])
        seen &= key[None, :] <= position[:, None]
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(best - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        best = higher

    tau = tl.load(floats + head * 4, mask=real, other=1.0)
    slope = tl.load(floats + head * 4 + 1, mask=real, other=0.0)
    tau *= tl.exp2(slope * tl.log2((start + 64) / 8192.0))
    threshold = best + tl.log(tl.where(scored, tau * total, 1.0))
    mean = tl.load(
        means + (place * (tl.num_programs(1) * SHARE // GROUP) + kv_head) * D + channel,
        mask=channel < D,
        other=0.0,
    )
    x = rows.to(tl.float32)
    amax = tl.max(tl.abs(x), 1)
    bad = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1)
    bias = scale * tl.sum(x * mean[None, :], 1) - threshold
    out = (program * tl.num_programs(1) + share) * SHARE_ROWS + row
    own_codes = round_codes(x, amax[:, None], LIMIT, BITS)
    store_codes(codes, out, own_codes, SHARE_ROWS, D, BLOCK_D, PACKED)
    # A row that is not scored has a bias that nothing makes up for.
    tl.store(slopes + out, tl.where(scored, scale * step_of(amax, bad, LIMIT), 0.0))
    tl.store(biases + out, tl.where(scored, bias, float("-inf")))


@triton.jit
def mass_of(products, unit, bias):
    """Sums of `selection.mass.exp_linear` over the 16 keys in integer ``products``
    [M, PARTS, N, 16 / PARTS].

    Of ``unit`` [M, N] times a product and ``bias`` [M], in nats. The bits of a float are linear
    between powers of two, so that scale, bias and the exponent's offset are one multiply-add, and
    the exponential a conversion to an integer. What is below 2^-126 comes out as that or less.
    """
    unit = unit * (LOG2_E * ONE_OCTAVE)
    bias = bias * (LOG2_E * ONE_OCTAVE) + 127.0 * ONE_OCTAVE
    bits = products.to(tl.float32) * unit[:, None, :, None] + bias[:, None, None, None]
    bits = tl.minimum(tl.maximum(bits, 0.0), 250.0 * ONE_OCTAVE).to(tl.int32)  # 2^123 at most
    return tl.sum(tl.sum(bits.to(tl.float32, bitcast=True), 1), 2)


@triton.jit
def multiply(
    queries, keys,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes' products [ROWS, KEYS]: int32, or, of packed ones, fp32 and a quarter of it, since E2M1
    counts in halves. Both are exact: a product is 144 at most, a sum of 256 below 2^24."""
    if PACKED:  # as MXFP4 with every scale 2^0
        one = tl.full([ROWS, BLOCK_D // 32], 127, tl.uint8)
        ones = tl.full([KEYS, BLOCK_D // 32], 127, tl.uint8)
        return tl.dot_scaled(queries, one, "e2m1", keys, ones, "e2m1", out_dtype=tl.float32)
    else:
        return tl.dot(queries, keys, out_dtype=tl.int32)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["key_slots", "words"])
def score_tiles(
    key_codes, key_steps, row_codes, slopes, biases, slots, blocks, ints, floats, mask,
    key_slots, words,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr, SHARE_ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
    HAS_SALE: tl.constexpr, HAS_MASS: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program: WORDS * 512 keys for the rows of TOGETHER `anchor_rows` programs of one request.

    Sets in int32 ``mask`` [B, Hq, words] bit j of word w where subtile 32 w + j is to be computed.
    A `sale` tile of more than 16 keys is the union of its subtiles, which `compact` makes; the
    mass of a `mass` tile is summed here.
    """
    program, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_head = share * SHARE // GROUP
    any_block = tl.load(slots + program * TOGETHER * 3).to(tl.int64)
    base = tl.load(blocks + any_block * 8 + 6).to(tl.int64)  # one request's, of all of them

    ROWS: tl.constexpr = TOGETHER * SHARE_ROWS
    # A member: a head of one of those TOGETHER, 16 rows.
    MEMBERS: tl.constexpr = ROWS // 16
    member = tl.arange(0, MEMBERS)
    own = member % (SHARE_ROWS // 16)
    block = tl.load(slots + (program * TOGETHER + member // (SHARE_ROWS // 16)) * 3).to(tl.int64)
    start, context = tl.load(blocks + block * 8 + 1), tl.load(blocks + block * 8 + 5)
    of = ints + (share * SHARE + own) * 8
    real = own < SHARE
    scores = (tl.load(of, mask=real, other=0) >= SALE) & (
        tl.load(of + 7, mask=real, other=0) == BITS
    )
    scores &= tl.load(of + 6, mask=real, other=0) <= context
    tile = tl.load(of + 3, mask=real, other=16)
    sink = tl.load(of + 1, mask=real, other=0)
    local = tl.load(of + 2, mask=real, other=0)
    growth = tl.load(floats + (share * SHARE + own) * 4 + 2, mask=real, other=0.0)
    stops = local_start(start, local, growth, tile)
    stop = tl.max(tl.where(scores, stops, 0))
    lowest = tl.min(tl.where(scores, sink, stop))
    first_word = tl.maximum(tl.program_id(2) * WORDS, lowest // 512)
    last_word = tl.minimum((tl.program_id(2) + 1) * WORDS, tl.cdiv(stop, 512))

    row = tl.arange(0, ROWS)
    # Of two channels where codes are packed.
    BYTES: tl.constexpr = D // 2 if PACKED else D
    BLOCK_B: tl.constexpr = BLOCK_D // 2 if PACKED else BLOCK_D
    byte = tl.arange(0, BLOCK_B)
    in_rows = program * TOGETHER + row // SHARE_ROWS
    in_rows = (in_rows * tl.num_programs(1) + share) * SHARE_ROWS + row % SHARE_ROWS
    queries = tl.load(
        row_codes + in_rows[:, None] * BYTES + byte[None, :], mask=(byte < BYTES)[None, :], other=0
    )  # [M, BLOCK_B]
    slope, bias = tl.load(slopes + in_rows), tl.load(biases + in_rows)
    if HAS_MASS:
        row_of = row % SHARE_ROWS // 16
        row_at = ints + (share * SHARE + row_of) * 8
        kind = tl.load(row_at, mask=row_of < SHARE, other=0)
        row_tile = tl.load(row_at + 3, mask=row_of < SHARE, other=16)

    N: tl.constexpr = BLOCK_N // 16  # subtiles of one product
    # The keys of a subtile lie in PARTS of a product's columns, at the same place in each: where a
    # thread has but a few adjacent columns of many, as NVIDIA's have, they are then of one subtile.
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    RUN: tl.constexpr = 16 // PARTS
    column = tl.arange(0, BLOCK_N)
    key_lane = column % WIDTH // RUN * 16 + column // WIDTH * RUN + column % RUN
    # Slots are multiples of 512, which lets steps be read four at a time.
    step_at = key_steps + tl.multiple_of(kv_head * (key_slots // 16) + base // 16, 32)
    key_at = key_codes + (kv_head * key_slots + base) * BYTES
    places = key_lane[None, :] * BYTES + byte[:, None]
    # What a key's product must exceed, in units of its step. Where a row is all zeros, any or none.
    least = tl.div_rn(-bias, slope)
    if HAS_MASS:
        # Where an input was not finite, a step or a row's bias is NaN; then a product's unit is.
        slope = tl.where((slope >= 0) & (bias == bias), slope, float("nan"))
    flag = (1 << tl.arange(0, N))[None, :]
    for word in range(first_word, last_word):
        bits = tl.zeros([ROWS, N], tl.int32)
        for part in range(512 // BLOCK_N):  # from the last: each moves the bits of those before
            key = word * 512 + 512 - BLOCK_N - part * BLOCK_N
            at = key_at + key * BYTES + places
            if BLOCK_D == D:
                keys = tl.load(at)
            else:
                keys = tl.load(at, mask=(byte < BYTES)[:, None], other=0)
            product = multiply(queries, keys, ROWS, BLOCK_N, BLOCK_D, PACKED)  # [M, BLOCK_N]
            step = tl.load(step_at + tl.multiple_of(key // 16, BLOCK_N // 16) + tl.arange(0, N))
            if PACKED:
                step *= 4.0
            groups = tl.reshape(product, [ROWS, PARTS, N, 16 // PARTS])
            keep = tl.zeros([ROWS, N], tl.int1)
            if HAS_SALE:
                best = tl.max(tl.max(groups, 1), 2).to(tl.float32)
                keep = ~(best * step[None, :] <= least[:, None])
            if HAS_MASS:
                unit = slope[:, None] * step[None, :]
                mass = mass_of(groups, unit, bias)  # [M, N]
                if WIDE:
                    pair = tl.sum(tl.reshape(mass, [ROWS, N // 2, 2]), 2)
                    quad = tl.sum(tl.reshape(pair, [ROWS, N // 4, 2]), 2)
                    pair = _repeat(pair, ROWS, N // 2, 2)
                    quad = _repeat(quad, ROWS, N // 4, 4)
                    wide = tl.where(row_tile[:, None] == 32, pair, quad)
                    mass = tl.where(row_tile[:, None] == 16, mass, wide)
                unknown = ~(unit < float("inf"))
                keep = tl.where(kind[:, None] == MASS, (mass > 1) | unknown, keep)
            bits = bits * (1 << N) + tl.where(keep, flag, 0)
        bits = tl.reduce(bits, 1, _either)
        bits = tl.reduce(tl.reshape(bits, [MEMBERS, 16]), 1, _either)
        out = (block * HEADS + share * SHARE + own) * words + word
        tl.atomic_or(mask + out, bits, mask=real & scores)


@triton.jit
def _repeat(x, ROWS: tl.constexpr, N: tl.constexpr, TIMES: tl.constexpr):
    """Each column TIMES times: [ROWS, N] to [ROWS, N * TIMES]."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [ROWS, N, TIMES]), [ROWS, N * TIMES])
