"""The CPU backend: vLLM's own CPU_ATTN, but for the rows that are planned sparse.

Follows vLLM 0.32's cpu_attn.py.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from vllm_sparse_backend import compat
from vllm_sparse_backend.backend import observe
from vllm_sparse_backend.backend.cpu_metadata import MixedMetadata, SparsePrefillCPUMetadataBuilder
from vllm_sparse_backend.backend.plan import DenseReason, LayerTraits
from vllm_sparse_backend.backend.worker import Worker
from vllm_sparse_backend.ops import PolicyTable, paged_sparse_attention

KINDS = {
    AttentionType.ENCODER: DenseReason.ENCODER,
    AttentionType.ENCODER_ONLY: DenseReason.ENCODER,
    AttentionType.ENCODER_DECODER: DenseReason.CROSS_ATTENTION,
}


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
        model = get_current_vllm_config().model_config
        self.traits = LayerTraits(
            head_dim=self.head_size,
            dtype=str(model.dtype).removeprefix("torch."),
            kind=KINDS.get(self.attn_type),
            sliding_window=self.sliding_window != -1,
            sinks=self.sinks is not None,
            softcap=bool(self.logits_soft_cap),
            alibi=self.alibi_slopes is not None,
            kv_sharing=self.kv_sharing_target_layer_name is not None,
            draft=compat.is_draft_model(),
            context_parallel=self.dcp_world_size > 1 or self.pcp_world_size > 1,
            quantized_kv=self.is_fp8_kv_cache,
        )
        self._sparse: tuple[Worker, PolicyTable] | None = None

    def run_sparse(self, worker: Worker, layer_name: str) -> None:
        """Follow the steps' plans from now on, under the policies of this layer."""
        self._sparse = worker, worker.policies(layer_name, self.num_heads, self.head_size)
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
        worker, policies = self._sparse
        for rows, part in mixed.parts:
            super().forward(
                layer, query[rows], key[rows], value[rows], kv_cache, part, output[rows]
            )
        for observer in observe.observers:
            observer(self._call(layer, query, kv_cache, mixed))
        _, stats = paged_sparse_attention(
            query,
            kv_cache,
            mixed.block_table,
            mixed.query_start_loc,
            mixed.seq_lens,
            policies,
            scale=self.scale,
            requests=mixed.plan.core,
            kv_layout=layer.isa,
            out=output,
        )
        worker.count_plan(mixed.plan)
        worker.count_stats(stats, policies)
        return output

    def _call(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, mixed: MixedMetadata
    ) -> observe.Call:
        return observe.Call(
            layer=compat.layer_index(self._layer_name),
            requests=mixed.plan.core,
            q=query,
            kv_cache=kv_cache,
            block_table=mixed.block_table,
            query_start_loc=mixed.query_start_loc,
            seq_lens=mixed.seq_lens,
            scale=self.scale,
            kv_layout=layer.isa,
        )
