"""What a list selector sees: one step of one request, by the heads that it is to choose for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.selection.blocks import QBlock, causal_tiles, q_blocks
from vllm_sparse_backend.selection.policy import Q_BLOCK

Read = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class View:
    """Some heads' queries of a step, and the keys and values of all of the request so far.

    The G heads share one kv head and one policy. The T rows of ``q`` are the last T of the S
    positions of the context: of a prompt that is read in chunks the newest chunk, of which the
    first and the last q block may be there in part. K and V are read from the cache when they are
    first asked for, so that a rule that needs none costs no copy.
    """

    q: torch.Tensor  # [G, T, D], in the model's dtype, after RoPE
    seq_len: int  # S
    tile: int  # keys per tile
    scale: float  # of q·k
    prompt_len: int  # of the prompt of which this may be a chunk; S where nobody knows
    heads: tuple[int, ...]  # [G], counted over all ranks
    num_heads: int  # of the layer, over all ranks
    layer: int | None  # in the model; None: these are tensors of no model
    read: Read  # k and v [S, D]

    @cached_property
    def _keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read()

    @property
    def k(self) -> torch.Tensor:
        """[S, D], in the cache's dtype."""
        return self._keys_values[0]

    @property
    def v(self) -> torch.Tensor:
        """[S, D], in the cache's dtype."""
        return self._keys_values[1]

    @property
    def offset(self) -> int:
        """The position of the first row of ``q``: S - T."""
        return self.seq_len - self.q.shape[1]

    @cached_property
    def blocks(self) -> list[QBlock]:
        """The q blocks: 64 positions each, aligned to 0, cut to those that are there."""
        return q_blocks(self.q.shape[1], self.seq_len)

    # The same as tensors: made where `q` is, since a copy from the host would be waited for.

    @cached_property
    def starts(self) -> torch.Tensor:
        """The aligned positions of the q blocks, int64 [blocks]."""
        number = torch.arange(len(self.blocks), device=self.q.device)
        return (number + self.first_block) * Q_BLOCK

    @cached_property
    def firsts(self) -> torch.Tensor:
        """The first row that is there of each q block, int64 [blocks]."""
        return self.starts.clamp(min=self.offset)

    @cached_property
    def ends(self) -> torch.Tensor:
        """One past the last row that is there of each q block, int64 [blocks]."""
        return (self.starts + Q_BLOCK).clamp(max=self.seq_len)

    @property
    def first_block(self) -> int:
        """The number of the first q block, counted from position 0."""
        return self.offset // Q_BLOCK

    @property
    def num_tiles(self) -> int:
        """Tiles of the context, the last of which may be there in part."""
        return causal_tiles(self.seq_len, self.tile)

    @cached_property
    def causal(self) -> torch.Tensor:
        """bool [blocks, tiles]: those that some row of the q block may see."""
        first_key = torch.arange(self.num_tiles, device=self.q.device) * self.tile
        return first_key < self.ends[:, None]

    def last(self, n: int) -> slice:
        """The last ``n`` of the rows of ``q``, or all if there are fewer.

        What stands for "the last queries of the prompt" here. A chunk's own last rows are all that
        is there when its tiles are chosen, so a prompt that is read in chunks is judged by the end
        of each of them.
        """
        rows = self.q.shape[1]
        return slice(max(0, rows - n), rows)

    def rows(self, block: QBlock) -> slice:
        """The rows of ``q`` that are a q block's."""
        return slice(block.first - self.offset, block.end - self.offset)

    def pooled_q(self) -> torch.Tensor:
        """The mean of each q block's present rows, fp32 [G, blocks, D]."""
        before, after = self.offset % Q_BLOCK, -self.seq_len % Q_BLOCK
        rows = pad(self.q.float(), (0, 0, before, after)).unflatten(1, (-1, Q_BLOCK))
        return rows.sum(2) / (self.ends - self.firsts)[:, None]

    def pooled_k(self, size: int | None = None) -> torch.Tensor:
        """The mean of every ``size`` keys (of a tile's, unless given), fp32 [ceil(S / size), D].

        The last is of those that are there.
        """
        size = size or self.tile
        missing = -self.seq_len % size
        sums = pad(self.k.float(), (0, 0, 0, missing)).unflatten(0, (-1, size)).sum(1)
        counts = torch.full((len(sums), 1), float(size), device=sums.device)
        counts[-1] -= missing
        return sums / counts

    def scores(self, rows: slice) -> torch.Tensor:
        """Scaled scores of some rows of ``q`` with all keys, fp32 [G, n, S], -inf where a key is
        later than the row. 64 rows of 128K keys are 32 MB a head."""
        key = torch.arange(self.seq_len, device=self.q.device)
        later = key > key[self.offset :][rows, None]
        found = self.scale * (self.q[:, rows].float() @ self.k.float().T)
        return found.masked_fill(later, -torch.inf)

    def by_tile(self, x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """[..., S] of keys to [..., tiles, tile]; what is missing of the last is ``value``."""
        missing = -self.seq_len % self.tile
        return pad(x, (0, missing), value=value).unflatten(-1, (-1, self.tile))
