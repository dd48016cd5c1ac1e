"""Where a prompt's last rows look: the softmax mass of every column and every diagonal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_sparse_backend.selection.products import of_these
from vllm_sparse_backend.selection.view import View


class Probe(NamedTuple):
    """Means over the probed rows of one head, fp32 [S] each. NaN where a score was."""

    columns: torch.Tensor  # by key
    diagonals: torch.Tensor  # by how many positions a key lies before its row


def probes(view: View, keys: torch.Tensor, rows: int) -> Iterator[Probe]:
    """Of each head of the view: softmax over all keys for its last ``rows`` rows, or for all there
    are if fewer.

    ``keys`` is the view's K in fp32. Memory: n rows of S + n - 1 columns, at 128K keys 64 MB for
    128 rows.
    """
    last, seq_len = view.last(rows), view.seq_len
    n = last.stop - last.start
    # A row's exponentials behind n - 1 zeros: read with one column more per row than there are,
    # diagonals lie below each other. One for all heads: fresh memory costs what a product does.
    skewed = keys.new_zeros(n, seq_len + n - 1)
    mass, lines = skewed[:, n - 1 :], skewed.as_strided((n, seq_len), (seq_len + n, 1))
    later = torch.ones(n, n, dtype=torch.bool, device=keys.device).triu(1)
    for query in view.q[:, last]:
        with of_these(view.q, view.k):
            torch.mm(query.float(), keys.T, out=mass)
        mass.mul_(view.scale)
        mass[:, seq_len - n :].masked_fill_(later, -torch.inf)
        mass.sub_(mass.amax(1, keepdim=True)).exp_()
        share = 1 / (n * mass.sum(1))
        # The i-th row is n - 1 - i before the last: its key at a distance d is in column S - 1 - d.
        yield Probe(share @ mass, (share @ lines).flip(0))
