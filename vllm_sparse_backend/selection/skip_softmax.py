"""Skip-softmax (BLASST, arXiv 2512.12087): tiles far below the highest score so far are dropped.

The paper has it in the attention kernel: all products with keys are computed, and where a tile's
highest score is below the row's running maximum by more than ln(1 / lambda), its softmax and its
product with V are skipped. The running maximum is that of the tiles before it in key order and its
own. What is right for lambda goes with the inverse of the length; the paper calibrates
lambda = a * exp(b * S) / L for a sparsity S at L tokens, a and b once per model. The paper gives no
a and b for all; 100 and 5 are the example of TensorRT-LLM's documentation for prefill.

Here it is a list selector: exact scores, the exact running maximum, and a tile is dropped if all
rows of the q block drop it. The products with K are thus paid for twice, and it is here to be
compared, not to be fast. Tiles are the policy's 16, 32 or 64 keys and 64 rows; kernels take 128 by
128, where it is rarer that all rows drop one. L is the whole prompt's length where it is known, so
that chunks are treated alike.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn.functional import pad

from vllm_sparse_backend.selection.coarse import in_parts
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.policy import Q_BLOCK
from vllm_sparse_backend.selection.products import of_these
from vllm_sparse_backend.selection.view import View

KEYS_AT_ONCE: Final = 512  # a multiple of every tile: 4 MB of scores for 2048 rows


class SkipSoftmax(ListSelector):
    """Tiles whose highest score is within ln(1 / lambda) of the highest so far, in some row."""

    selector: Literal["skip_softmax"] = "skip_softmax"
    main_parameter: ClassVar[str] = "sparsity"
    sparsity: float = Field(
        default=0.5, ge=0.0, le=1.0, description="S of lambda = a * exp(b * S) / L, at most 1"
    )
    a: float = Field(default=100.0, ge=0.0, le=1e9, description="tokens")
    b: float = Field(default=5.0, ge=0.0, le=50.0)
    threshold: float | None = Field(
        default=None, ge=0.0, le=1.0, description="lambda itself, whatever the length"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        fields = type(self).model_fields
        if self.threshold is not None:
            for name in ("sparsity", "a", "b"):
                if (value := getattr(self, name)) != fields[name].default:
                    raise ValueError(
                        f"threshold: want it alone, or {name} without it; got {self.threshold} "
                        f"and {name} {value}"
                    )
        return self

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """By the sparsity that is asked for."""
        return tuple(cls(sparsity=sparsity) for sparsity in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0))

    def scaled(self, factor: float) -> Self:
        """With that multiple of lambda."""
        if self.threshold is not None:
            return self.model_copy(update={"threshold": min(1.0, self.threshold * factor)})
        return self.model_copy(update={"a": min(1e9, self.a * factor)})

    def limit(self, prompt_len: int) -> float:
        """ln(lambda), at most 0."""
        lam = self.threshold
        if lam is None:
            lam = min(1.0, self.a * math.exp(self.b * self.sparsity) / prompt_len)
        return math.log(lam) if lam > 0 else -math.inf

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`."""
        return in_parts(self._keep, view)

    def _keep(self, view: View) -> torch.Tensor:
        device = view.q.device
        limit = self.limit(view.prompt_len) / view.scale  # scores are compared as they come
        position = torch.arange(view.offset, view.seq_len, device=device)
        absent = (view.offset % Q_BLOCK, -view.seq_len % Q_BLOCK)
        # [D, T] of each head; its rows' highest scores so far.
        columns = [query.float().T.contiguous() for query in view.q]
        highest = torch.full(view.q.shape[:2], -torch.inf, dtype=torch.float32, device=device)
        kept = torch.empty(
            len(view.heads), view.num_tiles, len(view.blocks), dtype=torch.bool, device=device
        )
        # Of as many keys as are looked at at a time; fresh memory for each would cost more.
        scores = torch.empty(KEYS_AT_ONCE, len(position), dtype=torch.float32, device=device)
        for begin in range(0, view.seq_len, KEYS_AT_ONCE):
            keys = view.k[begin : begin + KEYS_AT_ONCE].float()
            later = torch.arange(begin, begin + KEYS_AT_ONCE, device=device)[:, None] > position
            at, number = begin // view.tile, -(-len(keys) // view.tile)
            for head, query in enumerate(columns):
                with of_these(view.q, view.k):
                    torch.mm(keys, query, out=scores[: len(keys)])
                if begin + KEYS_AT_ONCE > view.offset:
                    scores.masked_fill_(later, -torch.inf)
                best = scores.unflatten(0, (-1, view.tile)).amax(1)[:number]  # [tiles, T]
                running = torch.empty_like(best)
                for tile, so_far in zip(best, running, strict=True):  # as fast as cummax, twice
                    highest[head] = torch.maximum(highest[head], tile, out=so_far)
                within = pad(~(best - running < limit), absent)
                kept[head, at : at + number] = within.unflatten(1, (-1, Q_BLOCK)).any(2)
        return kept.transpose(1, 2)
