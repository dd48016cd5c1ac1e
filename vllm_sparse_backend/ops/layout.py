"""vLLM's KV cache as it lies in memory, written and read with plain torch.

The cache is [num_blocks, Hkv, N, 2*D], N tokens a block. On GPUs, "strided", it is what that shape
says: a token's key in the first D channels, its value in the last, and blocks, heads and tokens as
far apart as their strides. On CPUs the shape is only a size: each (block, kv head) is one
contiguous region of N*D keys followed by N*D values, laid out by the instruction set string vLLM
chose for the layer (vLLM 0.32, ``csrc/cpu/cpu_attn_*.hpp``). Position of token n, channel d, in
elements:

==============  ===============================================  ===========
kv_layout       key                                              value
==============  ===============================================  ===========
vec, vec16      d*N + n                                          n*D + d
amx             n//16*16*D + d//2*32 + n%16*2 + d%2              d//16*16*N + n//2*32 + d%16*2 + n%2
==============  ===============================================  ===========
"""

from __future__ import annotations

import torch

# What N must be a multiple of, by layout.
BLOCK_MULTIPLE = {"vec": 32, "vec16": 16, "amx": 32, "strided": 16}


def views(kv_cache: torch.Tensor, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache as views into it.

    Keys are [num_blocks, Hkv, N/16, 16, D/2, 2] and values [num_blocks, Hkv, N/2, 2, D/16,
    16]: token and channel index are each cut in two, which is as far as a view of the amx
    layout goes. N and D must be multiples of 16.
    """
    blocks, heads, n, width = kv_cache.shape
    d = width // 2
    if kv_layout == "strided":
        k, v = kv_cache.split(d, 3)
        return (
            k.unflatten(3, (d // 2, 2)).unflatten(2, (n // 16, 16)),
            v.unflatten(3, (d // 16, 16)).unflatten(2, (n // 2, 2)),
        )
    k, v = kv_cache.view(blocks, heads, 2, n * d).unbind(2)
    if kv_layout == "amx":
        return (
            k.view(blocks, heads, n // 16, d // 2, 16, 2).transpose(3, 4),
            v.view(blocks, heads, d // 16, n // 2, 16, 2).permute(0, 1, 3, 5, 2, 4),
        )
    return (
        k.view(blocks, heads, d // 2, 2, n // 16, 16).permute(0, 1, 4, 5, 2, 3),
        v.view(blocks, heads, n // 2, 2, d // 16, 16),
    )


def pack(
    k: torch.Tensor, v: torch.Tensor, kv_layout: str = "vec", block_size: int = 128
) -> torch.Tensor:
    """Lay plain ``k``, ``v`` [S, Hkv, D] out as a cache [ceil(S/N), Hkv, N, 2*D].

    Block i of the cache holds the positions from i*N; what is past S is zero.
    """
    length, heads, d = k.shape
    blocks = -(-length // block_size)
    cache = k.new_zeros(blocks, heads, block_size, 2 * d)
    for plain, view in zip((k, v), views(cache, kv_layout), strict=True):
        padded = plain.new_zeros(blocks * block_size, heads, d)
        padded[:length] = plain
        by_block = padded.view(blocks, block_size, heads, d).transpose(1, 2)
        view.copy_(by_block.reshape(view.shape))
    return cache


def unpack(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, seq_len: int, kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one sequence's keys and values back, [S, Hkv, D] each, copies.

    ``block_ids`` are its blocks in the order of its positions, at least ceil(S/N) of them.
    """
    _, heads, n, width = kv_cache.shape
    used = block_ids[: -(-seq_len // n)].long()
    k, v = (
        view.reshape(-1, heads, n, width // 2).transpose(1, 2).flatten(0, 1)[:seq_len]
        for view in views(kv_cache[used], kv_layout)
    )
    return k, v
