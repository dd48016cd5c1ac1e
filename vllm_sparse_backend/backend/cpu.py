"""The CPU backend: vLLM's own CPU_ATTN, but for the rows that are planned sparse.

Follows vLLM 0.32's cpu_attn.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from vllm_sparse_backend.backend import observe
from vllm_sparse_backend.backend.cpu_metadata import MixedMetadata, SparsePrefillCPUMetadataBuilder
from vllm_sparse_backend.backend.group import traits_of
from vllm_sparse_backend.backend.worker import Worker
from vllm_sparse_backend.ops import PolicyTable, paged_sparse_attention


class SparsePrefillCPUBackend(CPUAttentionBackend):
    """What vLLM instantiates the rest through. Its name stays CPU_ATTN, which vLLM compares."""

    @staticmethod
    def get_impl_cls() -> type[SparsePrefillCPUImpl]:
        """The layers' class."""
        return SparsePrefillCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SparsePrefillCPUMetadataBuilder]:
        """The planner's class."""
        return SparsePrefillCPUMetadataBuilder


class SparsePrefillCPUImpl(CPUAttentionBackendImpl):
    """The attention of one layer. CPU_ATTN's unless told otherwise by the layer's builder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.traits = traits_of(self)
        self._sparse: tuple[Worker, Callable[[float], PolicyTable]] | None = None

    def run_sparse(self, worker: Worker, layer_name: str) -> None:
        """Follow the steps' plans from now on, under the policies of this layer."""
        self._sparse = worker, worker.tables(layer_name, self.num_heads, self.head_size)
        self._layer_name = layer_name

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step into ``output``; shapes as in the base class.

        K and V of the step are in ``kv_cache`` already.
        """
        mixed = attn_metadata if isinstance(attn_metadata, MixedMetadata) else None
        if mixed is None or self._sparse is None:
            whole = attn_metadata if mixed is None else mixed.whole
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                whole,
                output,
                output_scale,
                output_block_scale,
            )
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sparse_prefill: fused output quantization")
        worker, tables = self._sparse
        for rows, part in mixed.parts:
            super().forward(
                layer, query[rows], key[rows], value[rows], kv_cache, part, output[rows]
            )
        observe.show(self._layer_name, mixed, query, kv_cache, self.scale, layer.isa)
        for scale, requests in mixed.plan.calls:
            policies = tables(scale)
            _, stats = paged_sparse_attention(
                query,
                kv_cache,
                mixed.block_table,
                mixed.query_start_loc,
                mixed.seq_lens,
                policies,
                scale=self.scale,
                requests=requests,
                prompt_lens=mixed.prompt_lens,
                kv_layout=layer.isa,
                out=output,
            )
            # What keeps every tile has no scale.
            kept = mixed.plan.kept if scale == 1 else ()
            worker.count_stats(self._layer_name, stats, policies, kept)
        worker.count_plan(mixed.plan)
        return output
