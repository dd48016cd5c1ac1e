"""What a selector is for: the far keys that a few rows look for, in synthetic form.

Copying: a text whose second half repeats the first, so that each row looks at the token behind
its twin. Needles: one key in thousands, and one row that looks for it. Sink and window hold most
of a row's weight, as in real models: without that, noise keeps every tile, and nothing is shown.
"""

from __future__ import annotations

import functools

import pytest
import torch
from _attention import QKV, Paged, causal_mask, element_mask, make_paged, needs_core, plain, run
from _tiles import recall

from vllm_sparse_backend.ops import select_tiles
from vllm_sparse_backend.ops.tiles import q_blocks
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, Mass, Sale, Static, parse_policy
from vllm_sparse_backend.selection.estimate import scored_rows

pytestmark = [needs_core, pytest.mark.usefixtures("isa")]

DIM, LENGTH = 128, 2048
SCALE = DIM**-0.5
HEADS, KV_HEADS = 4, 2
GROUP = HEADS // KV_HEADS
SINK, LOOK = 12.0, 10.0  # nats above noise: the first key's score, and that of what is looked for
POLICIES: dict[str, Sale | Mass] = {
    "default": UNIFORM_DEFAULT,
    "sale": Sale(),
    "mass": parse_policy({"selector": "mass"}),  # type: ignore[dict-item]
    "sale, 4 bits, 64 keys": Sale(bits=4, tile=64),
    "mass, 8 bits, few rows": Mass(bits=8, tile=32, row_stride=8, tail=0),
}
BY_POLICY = pytest.mark.parametrize("name", POLICIES)


@functools.cache
def background(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [LENGTH, H, D], k, v [LENGTH, Hkv, D] in fp32: noise, and a first key that all look at."""
    g = torch.Generator().manual_seed(seed)
    q = 0.2 * torch.randn(LENGTH, HEADS, DIM, generator=g)
    k, v = torch.randn(2, LENGTH, KV_HEADS, DIM, generator=g)
    k += 2 * torch.randn(1, KV_HEADS, DIM, generator=g)  # keys lie about a common offset
    sink = torch.nn.functional.normalize(torch.randn(KV_HEADS, DIM, generator=g), dim=1)
    k -= (k * sink).sum(2, keepdim=True) * sink
    q += DIM**0.5 * sink.repeat_interleave(GROUP, 0)
    k[0] += SINK * sink
    return q, k, v


def looking_at(k: torch.Tensor, target: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
    """What a query [N, H, D] has of the keys ``target`` [N, H], to score them so much higher."""
    heads = torch.arange(HEADS) // GROUP
    keys = (k - k.mean(0))[target, heads]
    return nats[:, None] / SCALE * keys / (keys * keys).sum(2, keepdim=True)


# Copying

ROWS = 448  # of the second half


@functools.cache
def copying(dtype: torch.dtype) -> tuple[QKV, torch.Tensor, torch.Tensor]:
    """The last rows of a text that repeats itself, [rows] the key that each looks at, and dense.

    Row i looks at the key behind its twin's; one head a little, others more than at the first key.
    """
    q, k, v = (x.clone() for x in background(1))
    half = LENGTH // 2
    k[half + 1 :], v[half + 1 :] = k[1:half], v[1:half]
    target = torch.arange(LENGTH - ROWS, LENGTH) - half + 1
    nats = torch.tensor([LOOK - 2, LOOK, SINK, SINK + 2])
    q = q[-ROWS:] + looking_at(k, target[:, None].expand(-1, HEADS), nats)
    qkv = q.to(dtype), k.to(dtype), v.to(dtype)
    dense = plain(qkv[0].double(), qkv[1].double(), qkv[2].double(), causal_mask(ROWS, LENGTH))
    return qkv, target, dense


def shares_of_copy(qkv: QKV, target: torch.Tensor) -> torch.Tensor:
    """[H, rows]: each row's softmax weight of the key that it looks at."""
    k = qkv[1].float().repeat_interleave(GROUP, 1)
    s = SCALE * torch.einsum("thd,shd->hts", qkv[0].float(), k)
    s = s.masked_fill(~causal_mask(ROWS, LENGTH), -torch.inf)
    return s.softmax(2)[:, torch.arange(ROWS), target]


@BY_POLICY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_is_kept(dtype: torch.dtype, name: str) -> None:
    """Each head's diagonal to 95% of its weight; where that is most, and of any row's."""
    qkv, target, dense = copying(dtype)
    paged = make_paged([qkv])
    tiles = select_tiles(*paged.tensors, POLICIES[name], impl="cpu")
    weights = shares_of_copy(qkv, target)
    assert weights[0].median() < 0.02, "the case shows nothing"
    assert weights[3].median() > 0.5, "the case shows nothing"
    assert sum(tiles.computed) < 0.5 * sum(tiles.causal), "the case shows nothing"
    kept = element_mask(tiles)[:, torch.arange(ROWS), target]  # [H, rows]
    assert ((weights * kept).sum(1) >= 0.95 * weights.sum(1)).all()
    for head in (2, 3):
        assert recall(qkv, tiles, head, SCALE).min() >= 0.95
    out, _ = run(paged, POLICIES[name], "cpu")
    assert (out.double() - dense).norm() <= 0.03 * dense.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sink_and_window_alone_lose_a_copy(dtype: torch.dtype) -> None:
    qkv, target, dense = copying(dtype)
    paged = make_paged([qkv])
    policy = Static(sink=UNIFORM_DEFAULT.sink, local=UNIFORM_DEFAULT.local)
    tiles = select_tiles(*paged.tensors, policy, impl="cpu")
    assert not element_mask(tiles)[:, torch.arange(ROWS), target].any()
    assert recall(qkv, tiles, 3, SCALE).median() < 0.3
    out, _ = run(paged, policy, "cpu")
    assert (out.double() - dense).norm() > 0.3 * dense.norm()


# Needles

DEPTHS = torch.arange(0, LENGTH, 16) + torch.arange(LENGTH // 16) % 16  # one in every 16 keys


def test_a_last_row_finds_its_needle_at_every_depth() -> None:
    """As many requests of one row on one and the same context, each after another needle."""
    q, k, v = background(2)
    heads = DEPTHS[:, None].expand(-1, HEADS)
    q = q[-1:] + looking_at(k, heads, torch.full((HEADS,), LOOK))
    count = len(DEPTHS)
    one = make_paged([(q[:1].bfloat16(), k.bfloat16(), v.bfloat16())])
    paged = Paged(
        q.bfloat16(),
        one.kv_cache,
        one.block_table.repeat(count, 1),
        torch.arange(count + 1, dtype=torch.int32),
        torch.full((count,), LENGTH, dtype=torch.int32),
        "vec",
    )
    for name, policy in POLICIES.items():
        computed = 0
        for r, depth in enumerate(DEPTHS.tolist()):
            tiles = select_tiles(*paged.tensors, policy, request=r, impl="cpu")
            for head in range(HEADS):
                assert depth // policy.tile in tiles.row(head, 0), (name, depth, head)
            computed += sum(tiles.computed)
        assert computed < 0.5 * count * sum(tiles.causal), "the case shows nothing"


def rows_with_needles(policy: Sale | Mass, count: int) -> torch.Tensor:
    """bool [count]: which of the last rows are scored."""
    scored = torch.zeros(LENGTH, dtype=torch.bool)
    for _, first, end in q_blocks(count, LENGTH):
        scored[scored_rows(policy, first, end, LENGTH)] = True
    return scored[-count:]


def assert_needles(name: str, shifts: range) -> None:
    """Each scored row after a needle of its own: no two of a q block are in one tile of 16.

    From shift to shift every row's needle moves on to the next tile.
    """
    policy, count = POLICIES[name], 500  # begins inside a q block
    q, k, v = background(3)
    scored = rows_with_needles(policy, count)
    rows, place = torch.arange(count), torch.arange(LENGTH - count, LENGTH)
    block = place // 64 - place[0] // 64
    for shift in shifts:
        # Depths below the row's own window, where it must be chosen; heads look elsewhere.
        reach = place // 64 * 64 - policy.local - 64
        turn = (rows[:, None] + 29 * torch.arange(HEADS) + shift) % (reach // 16)[:, None]
        target = DEPTHS[turn]
        looks = looking_at(k, target, torch.full((HEADS,), LOOK))
        for looking, found in ((scored, True), (~scored, False)):
            own = q[-count:] + looks * looking[:, None, None]
            paged = make_paged([(own.bfloat16(), k.bfloat16(), v.bfloat16())])
            tiles = select_tiles(*paged.tensors, policy, impl="cpu")
            kept = torch.stack(
                [tiles.mask(h)[block, target[:, h] // policy.tile] for h in range(HEADS)]
            )[:, looking]
            if found:
                assert kept.all(), (name, shift)
                assert sum(tiles.computed) < 0.9 * sum(tiles.causal), "the case shows nothing"
            elif policy.row_stride > 1:  # by those rows alone that are scored
                assert kept.double().mean() < 0.3, "the case shows nothing"


@BY_POLICY
def test_every_scored_row_finds_its_needle(name: str) -> None:
    assert_needles(name, range(0, 120, 24))


@pytest.mark.all
@BY_POLICY
def test_every_scored_row_finds_its_needle_at_every_depth(name: str) -> None:
    assert_needles(name, range(120))
