"""The heads that list selectors choose for: their tiles, before the attention that takes them.

On whatever device the tensors are: `kept_by_head` and `kept_of_paged` wait for none, `tile_lists`
makes lists for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch

from vllm_sparse_backend.ops import layout
from vllm_sparse_backend.ops.policies import Place, PolicyTable
from vllm_sparse_backend.ops.tiles import TileList, q_blocks
from vllm_sparse_backend.selection import AnyPolicy, ListSelector
from vllm_sparse_backend.selection.kept import kept_tiles
from vllm_sparse_backend.selection.view import View

KeysValues = tuple[torch.Tensor, torch.Tensor]


def kept_by_head(
    q: torch.Tensor,
    policies: Sequence[AnyPolicy],
    place: Place,
    scale: float,
    seq_len: int,
    prompt_len: int,
    num_kv_heads: int,
    read: Callable[[int], KeysValues],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each head that has a list selector, and its tiles of one request, bool [blocks, tiles].

    ``q`` [T, Hq, D] are the last T of ``seq_len`` positions; ``read`` gives a kv head's keys and
    values [S, D]. In no order but that of kv heads, of which one is read at a time.
    """
    if q.shape[0] == 0:  # no q block to choose for
        listed = [i for i, policy in enumerate(policies) if isinstance(policy, ListSelector)]
        yield from ((head, q.new_zeros(0, 0, dtype=torch.bool)) for head in listed)
        return
    group = q.shape[1] // num_kv_heads
    for kv_head in range(num_kv_heads):
        of_policy: dict[ListSelector, list[int]] = {}
        for head in range(kv_head * group, (kv_head + 1) * group):
            if isinstance(policy := policies[head], ListSelector):
                of_policy.setdefault(policy, []).append(head)
        read_once = cache(partial(read, kv_head))  # for however many policies ask
        for policy, heads in of_policy.items():
            view = View(
                q=torch.stack([q[:, head] for head in heads]),
                seq_len=seq_len,
                tile=policy.tile,
                scale=scale,
                prompt_len=prompt_len,
                heads=tuple(place.first_head + head for head in heads),
                num_heads=place.num_heads,
                layer=place.layer,
                read=read_once,
            )
            yield from zip(heads, kept_tiles(policy, view), strict=True)


def kept_of_paged(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    table: PolicyTable,
    scale: float,
    seq_len: int,
    prompt_len: int,
    kv_layout: str,
) -> Iterator[tuple[int, torch.Tensor]]:
    """`kept_by_head` of one request whose keys lie in the paged cache, by the policies that are
    followed at its length.

    ``q`` [T, Hq, D] holds the request's rows, ``block_ids`` its pages. Memory: twice one kv head's
    keys and values, while they are copied out of the cache (128 MB at 128K tokens of bf16 and
    head_dim 128), and a byte for each (head of a group, q block, tile).
    """

    def read(kv_head: int) -> KeysValues:
        k, v = layout.unpack(kv_cache[:, kv_head : kv_head + 1], block_ids, seq_len, kv_layout)
        return k[:, 0], v[:, 0]

    followed, kv_heads = table.followed(seq_len), kv_cache.shape[1]
    return kept_by_head(q, followed, table.place, scale, seq_len, prompt_len, kv_heads, read)


def tile_lists(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    table: PolicyTable,
    scale: float,
    seq_len: int,
    prompt_len: int,
    kv_layout: str,
) -> TileList:
    """The tiles of one request's heads with list selectors; other heads' rows are empty.

    Arguments and memory as of `kept_of_paged`, and the lists twice while they are joined; a list
    has four bytes for each tile that is kept.
    """
    num_heads, blocks = q.shape[1], len(q_blocks(q.shape[0], seq_len))
    counts = torch.zeros(num_heads, blocks, dtype=torch.int64)
    tiles = [torch.empty(0, dtype=torch.int32)] * num_heads
    paged = q, kv_cache, block_ids, table, scale, seq_len, prompt_len, kv_layout
    for head, kept in kept_of_paged(*paged):
        counts[head] = kept.sum(1)
        tiles[head] = torch.arange(kept.shape[1], dtype=torch.int32).expand_as(kept)[kept]
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)))
    return TileList(indptr, torch.cat(tiles), table.tile_sizes, q.shape[0], seq_len)


REHEARSED = (100, 300)  # query rows and tokens of context: q blocks in part, more than one tile


def rehearse(table: PolicyTable, head_dim: int, device: torch.device | str = "cpu") -> None:
    """Have every list selector of a layer choose once, of random numbers on ``device``: so that one
    that does not do what it owes, or misses what it needs, stops a start and not a request.

    Raises SelectorError and whatever the selectors raise.
    """
    rows, seq_len = REHEARSED
    numbers = torch.Generator().manual_seed(0)
    made = torch.randn(3, seq_len, head_dim, generator=numbers, dtype=torch.float32, device="cpu")
    q, k, v = made.to(device, torch.bfloat16)  # as most models are
    for policy in dict.fromkeys(it for it in table.rows if isinstance(it, ListSelector)):
        head = table.rows.index(policy)
        view = View(
            q=q[None, -rows:],
            seq_len=seq_len,
            tile=policy.tile,
            scale=head_dim**-0.5,
            prompt_len=seq_len,
            heads=(table.place.first_head + head,),
            num_heads=table.place.num_heads,
            layer=table.place.layer,
            read=lambda: (k, v),
        )
        kept_tiles(policy, view)
