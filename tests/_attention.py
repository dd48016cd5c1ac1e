"""What the tests of the ops share: inputs, caches with traps in them, and the error budget."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from vllm_sparse_backend.ops import AttentionStats, TileList, paged_sparse_attention
from vllm_sparse_backend.ops.layout import pack
from vllm_sparse_backend.selection import Bits

BITS: tuple[Bits, ...] = (4, 6, 8, "fp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
CANARY = 12345.0
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

# On x86-64 a core that is missing or unusable fails the tests: a broken build must not
# pass as a skip.
needs_core = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the compiled core is for x86-64"
)
IMPLS = ("reference", pytest.param("cpu", marks=needs_core))

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_qkv(
    seed: int,
    rows: int,
    length: int,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> QKV:
    """q [rows, heads, dim], k and v [length, kv_heads, dim] with some of what real ones have.

    Keys about a common offset, a first key that every query looks at, neighbours that look
    alike, and one far key for every 16th query.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    group = heads // kv_heads
    drift = normal(length, kv_heads, dim).cumsum(0) / torch.arange(1, length + 1)[:, None, None]
    k = normal(length, kv_heads, dim) + 2 * normal(1, kv_heads, dim) + 4 * drift
    q = normal(rows, heads, dim) + drift[length - rows :].repeat_interleave(group, 1)
    shared = normal(kv_heads, dim)
    k[0] += 2 * shared
    q += shared.repeat_interleave(group, 0)
    for row in range(0, rows, 16):
        position = length - rows + row
        far = int(torch.randint(0, position + 1, (), generator=g))
        head = int(torch.randint(0, heads, (), generator=g))
        k[far, head // group] += 1.5 * q[row, head]
    v = normal(length, kv_heads, dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@dataclass(frozen=True)
class Paged:
    """A batch as ``paged_sparse_attention`` takes it."""

    q: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    kv_layout: str

    @property
    def tensors(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The positional arguments of the op."""
        return self.q, self.kv_cache, self.block_table, self.query_start_loc, self.seq_lens


def make_paged(
    batch: Sequence[QKV], kv_layout: str = "vec", block_size: int = 128, seed: int = 0
) -> Paged:
    """Spread the requests over shuffled pages; whatever belongs to no token is NaN."""
    caches = []
    for _, k, v in batch:
        padding = -len(k) % block_size
        tail = k.new_full((padding, *k.shape[1:]), torch.nan)
        caches.append(pack(torch.cat((k, tail)), torch.cat((v, tail)), kv_layout, block_size))
    needed = [len(cache) for cache in caches]
    pages = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed))
    first = caches[0]
    kv_cache = first.new_full((len(pages), *first.shape[1:]), torch.nan)
    kv_cache[pages[: sum(needed)]] = torch.cat(caches)
    # Behind a sequence's end a block table may hold anything.
    block_table = torch.full((len(batch), max(needed) + 2), 2**30, dtype=torch.int32)
    for r, own in enumerate(pages[: sum(needed)].split(needed)):
        block_table[r, : len(own)] = own
    rows = torch.tensor([0] + [len(q) for q, _, _ in batch])
    return Paged(
        torch.cat([q for q, _, _ in batch]),
        kv_cache,
        block_table,
        rows.cumsum(0).int(),
        torch.tensor([len(k) for _, k, _ in batch], dtype=torch.int32),
        kv_layout,
    )


def run(
    paged: Paged,
    policies: object,
    impl: str,
    requests: list[int] | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, AttentionStats]:
    """Call the op with an output that starts as NaN inside canaries; check the canaries."""
    rows, heads, dim = paged.q.shape
    buffer = torch.full((rows + 4, heads + 1, dim + 16), CANARY, dtype=paged.q.dtype)
    inside = buffer[2 : rows + 2, :heads, :dim]
    inside.fill_(torch.nan)
    out, stats = paged_sparse_attention(
        *paged.tensors,
        policies,  # type: ignore[arg-type]
        scale=scale,
        requests=requests,
        kv_layout=paged.kv_layout,
        out=inside,
        impl=impl,
    )
    assert out is inside
    result = out.clone()
    inside.fill_(CANARY)
    assert bool((buffer == CANARY).all()), "written outside of out"
    return result, stats


def causal_mask(rows: int, length: int) -> torch.Tensor:
    """bool [rows, length]: what the last ``rows`` of ``length`` positions may see."""
    return torch.ones(rows, length, dtype=torch.bool).tril(length - rows)


def element_mask(tiles: TileList) -> torch.Tensor:
    """bool [heads, rows, keys]: the elements that a tile list computes."""
    masks = []
    for head, size in enumerate(tiles.tile_sizes):
        mask = torch.zeros(tiles.query_len, tiles.seq_len, dtype=torch.bool)
        for block, edges in enumerate(tiles.blocks):
            offset = tiles.seq_len - tiles.query_len
            for tile in tiles.row(head, block).tolist():
                mask[edges.first - offset : edges.end - offset, tile * size :][:, :size] = True
        masks.append(mask & causal_mask(tiles.query_len, tiles.seq_len))
    return torch.stack(masks)


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention under ``mask`` ([T, S] or [H, T, S]) in the plainest way that is any good.

    Scores and softmax in fp32, the product with v in the inputs' dtype. With float64
    inputs all of it is float64: the truth.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    s = torch.einsum("thd,shd->hts", q.to(wide), k.to(wide))
    s = s * (q.shape[-1] ** -0.5 if scale is None else scale)
    p = s.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("hts,shd->thd", p, v)


def rounding_floor(qkv: QKV, mask: torch.Tensor, truth: torch.Tensor, scale: float) -> torch.Tensor:
    """[T, H, D] float64: what rounding alone costs, however good the implementation.

    The exact result once to the dtype, and every exact score s once to fp32, which changes its
    weight by the share u * |s|. Beside a 16-bit result's rounding the latter is nothing.
    """
    floor = ROUNDOFF[qkv[0].dtype] * truth.abs()
    if qkv[0].dtype == torch.float32:
        q, k, v = (x.double() for x in qkv)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = scale * torch.einsum("thd,shd->hts", q, k)
        p = s.masked_fill(~mask, -torch.inf).softmax(-1)
        floor += ROUNDOFF[torch.float32] * torch.einsum("hts,shd->thd", p * s.abs(), v.abs())
    return floor


def assert_accurate(
    out: torch.Tensor,
    qkv: QKV,
    mask: torch.Tensor,
    scale: float | None = None,
) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype.

    In the largest element and on average, and no budget is smaller than twice what rounding
    alone may cost: the largest error of a single row of plain torch is a matter of luck.
    """
    q, k, v = qkv
    truth = plain(q.double(), k.double(), v.double(), mask, scale)
    own = (out.double() - truth).abs()
    other = (plain(q, k, v, mask, scale).double() - truth).abs()
    floor = rounding_floor(qkv, mask, truth, q.shape[2] ** -0.5 if scale is None else scale)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    for name, of in (("largest", torch.amax), ("mean", torch.mean)):
        budget = 2 * max(float(of(other)), float(of(floor)))
        assert float(of(own)) <= budget, f"{name} error {float(of(own)):.3g} above {budget:.3g}"


def tie_width(q: torch.Tensor, k: torch.Tensor, scale: float) -> float:
    """How far the margins of two correct implementations may lie apart, one head, in nats.

    Scores, m and the estimates' mean term are fp32 sums of D products, each within
    D * u * |q| |k| of exact, whatever the order; l adds u per key and its exponentials'
    relative error, at most 3e-6 (< 2^-18). The integers are the same on both sides. A kernel
    holds the exponent as the bits of a float, in units of 2^-16.
    """
    u, dim = 2.0**-24, q.shape[1]
    keys = k.float().norm(dim=1).amax() + k.float().mean(0).norm()
    size = float(scale * q.float().norm(dim=1).amax() * keys)
    return 2 * ((2 * dim + 8) * u * size + len(k) * u + 2.0**-18 + 2.0**-16)
