"""SeerAttention (arXiv 2410.13276): a learned gate per head says which blocks of 64 are looked at.

A block's mean query, and its largest, smallest and mean key, before RoPE, go through a linear map
each and RoPE of the block's position; the softmax of their products over the blocks of keys is what
the attention's would be by blocks, as the gate has been taught. Blocks above a threshold are kept.

Gates are a file, which `vllm-sparse fit-gates` makes. What is different here: a gate for each query
head, where the paper's formula joins those that share keys (its released gates are per query head,
too); queries and keys come after RoPE and are turned back; of a q block that a prompt's chunk
begins or ends in, those queries are pooled that are there. With the length the softmax spreads over
more blocks, so that a threshold is one for lengths like those it was chosen at.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.selection import gates
from vllm_sparse_backend.selection.gates import Gates
from vllm_sparse_backend.selection.listed import ListSelector
from vllm_sparse_backend.selection.view import View


class Seer(ListSelector):
    """Keeps blocks of 64 keys that a head's gate gives more than ``threshold``. At 0 it keeps
    all."""

    selector: Literal["seer"] = "seer"
    main_parameter: ClassVar[str] = "threshold"
    threshold: float = Field(default=0.002, ge=0.0, le=1.0, description="share of the softmax")
    gates: str = Field(
        default="gates.safetensors", min_length=1, description="path of the gates' file"
    )
    digest: str = Field(
        default="",
        pattern=r"^(sha256:[0-9a-f]{64})?$",
        description="what the file must have, on every node; unless empty",
    )

    @classmethod
    def ladder(cls) -> tuple[Self, ...]:
        """The paper's thresholds, and higher ones for shorter contexts than its."""
        shares = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
        return tuple(cls(threshold=threshold) for threshold in shares)

    def files(self) -> tuple[str, ...]:
        """The gates."""
        return (self.gates,)

    def scaled(self, factor: float) -> Self:
        """With that multiple of the threshold."""
        return self.model_copy(update={"threshold": min(1.0, self.threshold * factor)})

    def keep(self, view: View) -> torch.Tensor:
        """As `ListSelector.keep`. Raises SelectorError if there are no gates for these heads."""
        its = self._gates(view)
        queries = gates.pooled_queries(view.q, view.offset, its.rotation)
        keys = gates.pooled_keys(view.k, its.rotation)
        share = its.logits(queries, keys[None], view.first_block).softmax(2)
        kept = ~(share <= self.threshold) | (self.threshold == 0)  # a NaN is kept
        return kept.repeat_interleave(gates.BLOCK // self.tile, 2)[..., : view.num_tiles]

    def _gates(self, view: View) -> Gates:
        """Those of the view's heads."""
        if view.layer is None:
            raise SelectorError(
                f"gates {self.gates}: want a layer of a model to take those of, got tensors of none"
            )
        of_layer = gates.load(self.gates, view.layer, self.digest, str(view.q.device))
        heads, dim = of_layer.q.shape[:2]
        if (heads, dim) != (view.num_heads, view.q.shape[2]):
            raise SelectorError(
                f"gates {self.gates}: want those of {view.num_heads} heads of {view.q.shape[2]} in "
                f"layer {view.layer}, got of {heads} heads of {dim}"
            )
        # Not by a list, which would be copied to a device.
        q, k = (torch.stack([its[head] for head in view.heads]) for its in (of_layer.q, of_layer.k))
        return gates.Gates(q, k, of_layer.rotation)
