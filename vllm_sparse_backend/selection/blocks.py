"""The geometry of q blocks and tiles: which positions a q block has, and which tiles it may see."""

from __future__ import annotations

from typing import NamedTuple

from vllm_sparse_backend.selection.policy import Q_BLOCK


class QBlock(NamedTuple):
    """A q block's positions in its sequence."""

    start: int  # the block's aligned position, a multiple of Q_BLOCK
    first: int  # its first present row; later than start where a chunk begins inside it
    end: int  # one past its last present row


def q_blocks(query_len: int, seq_len: int) -> list[QBlock]:
    """The q blocks that hold the last ``query_len`` of ``seq_len`` positions, ascending."""
    begin = seq_len - query_len
    return [
        QBlock(start, max(start, begin), min(start + Q_BLOCK, seq_len))
        for start in range(begin // Q_BLOCK * Q_BLOCK, seq_len, Q_BLOCK)
        if query_len > 0
    ]


def causal_tiles(end: int, tile: int) -> int:
    """How many tiles of ``tile`` keys a q block ending before position ``end`` may see."""
    return -(-end // tile)
