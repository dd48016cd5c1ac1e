"""HyperAttention (arXiv 2310.05869): queries and keys sorted by a locality-sensitive hash.

Half of the keys and the other half's queries are each sorted by which side of 7 random planes they
lie on, neighbours in the order of a Gray code; blocks of 256 keys meet the queries in the same part
of the order. 256 more keys, drawn evenly, stand for all others. Each half by itself is done the
same way, down to 4096 tokens, which are dense.

What is different here: q blocks and tiles are computed whole, and the keys of a sorted block lie
all over the context. So the pairs of query and key in the same block are counted by tile, and a q
block keeps the tiles that have most of them, as many as hold a block's keys. Drawn keys come by the
tile, too, and are only added: in the paper each counts for as many as were not drawn, which a tile
list cannot say. Halves begin at multiples of their size, not in the middle of the prompt, whose end
is not there while a chunk of it is read; of a half's queries, those that are there are sorted. (The
released code sorts by the Gray code of a side's number, not by the side's place in that code, so
that neighbours are more than one plane apart: a slip.)
"""

from __future__ import annotations

import random
from functools import cache
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.ranking import highest
from vllm_sparse_backend.selection.view import View


class Hyper(ListSelector):
    """Keeps the ``exact`` tokens around a q block, and of each half of a larger part before them
    ``block`` keys found by hashing and ``samples`` drawn ones."""

    selector: Literal["hyper"] = "hyper"
    main_parameter: ClassVar[str] = "exact"
    exact: int = Field(
        default=4096, ge=64, le=1 << 20, multiple_of=64, description="tokens of a dense part"
    )
    block: int = Field(
        default=256, ge=64, le=1 << 16, multiple_of=64, description="keys of a sorted block"
    )
    samples: int = Field(default=256, ge=0, le=1 << 16, multiple_of=64, description="keys drawn")
    projections: int = Field(default=7, ge=1, le=16, description="planes of the hash")
    seed: int = Field(default=0, ge=0, lt=1 << 32)

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's dense parts and those around them."""
        return tuple(cls(exact=exact) for exact in (8192, 4096, 2048, 1024, 512, 256))

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        device = view.q.device
        start = view.starts[:, None]
        first_key = torch.arange(view.num_tiles, device=device) * self.tile
        near = first_key >= start // self.exact * self.exact
        kept = near.repeat(len(view.heads), 1, 1)
        if view.seq_len <= self.exact:
            return kept

        planes = _planes(self.projections, view.q.shape[2], self.seed, device)
        of_q, q_unknown = _hashed(view.q, planes)
        of_k, k_unknown = _hashed(view.k, planes)
        size = self.exact
        while size < view.seq_len:
            for begin in range(view.offset // (2 * size) * 2 * size + size, view.seq_len, 2 * size):
                if begin + size > view.offset:
                    self._half(view, kept, of_q, of_k, begin, size)
            size *= 2
        unknown = torch.zeros_like(kept)
        for at, block in enumerate(view.blocks):
            unknown[:, at] = q_unknown[:, view.rows(block)].any(1)[:, None]
        return kept | unknown | view.by_tile(k_unknown.float()).any(1)

    def _half(
        self,
        view: View,
        kept: torch.Tensor,
        of_q: torch.Tensor,
        of_k: torch.Tensor,
        begin: int,
        size: int,
    ) -> None:
        """Add what queries of the ``size`` positions from ``begin`` on, those that are there, keep
        of as many keys before them. ``of_q`` [G, T] and ``of_k`` [S] are hashes."""
        heads, device = len(view.heads), kept.device
        first, end = max(begin, view.offset), min(begin + size, view.seq_len)
        rows, parts, tiles = end - first, max(1, size // self.block), size // self.tile
        # Each one's place in its order says which part of it that is.
        q_part = _places(of_q[:, first - view.offset : end - view.offset]) * parts // rows
        k_part = (_places(of_k[begin - size : begin]) // self.block).clamp(max=parts - 1)

        blocks = slice(first // Q_BLOCK - view.first_block, -(-end // Q_BLOCK) - view.first_block)
        count = blocks.stop - blocks.start
        block = torch.arange(first, end, device=device) // Q_BLOCK - first // Q_BLOCK
        head = torch.arange(heads, device=device)[:, None]
        by_block = _counted((head * count + block) * parts + q_part, heads * count * parts)
        tile = torch.arange(size, device=device) // self.tile
        by_tile = _counted(tile * parts + k_part, tiles * parts).view(tiles, parts)
        pairs = by_block.view(heads, count, parts) @ by_tile.T  # exact: whole numbers below 2^24

        found = highest(pairs, self.block // self.tile)
        for at, number in enumerate(view.heads):
            rng = random.Random(f"{self.seed} {view.layer} {number} {begin} {size}")
            drawn = rng.sample(range(tiles), min(tiles, self.samples // self.tile))
            found[at, :, drawn] = True
        before = slice((begin - size) // self.tile, begin // self.tile)
        kept[:, blocks, before] |= found


@cache
def _planes(count: int, dim: int, seed: int, device: torch.device) -> torch.Tensor:
    """Normals of random planes [dim, count]."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(dim, count, generator=numbers, device="cpu").to(device)


def _hashed(x: torch.Tensor, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of vectors [..., n, D] their places on a tour of all sides of the planes, on which each side
    is one plane away from the next, and which of them are not numbers; both [..., n]."""
    distance = x.float() @ planes
    bits = 1 << torch.arange(planes.shape[1], device=x.device)
    code = ((distance > 0) * bits).sum(-1)
    place, shift = code, 1
    while shift < planes.shape[1]:  # a Gray code's place is the running sum of its bits, modulo 2
        place, shift = place ^ (place >> shift), shift * 2
    return place, distance.isnan().any(-1)


def _places(hashes: torch.Tensor) -> torch.Tensor:
    """The place of each [..., n] in the order of the hashes; equals as they come."""
    order = hashes.argsort(dim=-1, stable=True)
    places = torch.arange(hashes.shape[-1], device=hashes.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _counted(numbers: torch.Tensor, below: int) -> torch.Tensor:
    """How often each number below ``below`` is there, fp32."""
    return torch.bincount(numbers.flatten(), minlength=below).float()
