"""The plan of each step beside the base backend's metadata. Follows vLLM 0.32's cpu_attn.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    SinkFullAttentionSpec,
)

from vllm_sparse_backend.backend.plan import DenseReason, Plan, Run, make_plan, why_dense
from vllm_sparse_backend.backend.start import capabilities
from vllm_sparse_backend.backend.worker import worker_of

# Groups whose layers are no plain causal attention, whatever they say of themselves.
KINDS: dict[type[Any], DenseReason] = {
    ChunkedLocalAttentionSpec: DenseReason.CHUNKED_ATTENTION,
    CrossAttentionSpec: DenseReason.CROSS_ATTENTION,
    EncoderOnlyAttentionSpec: DenseReason.ENCODER,
    SinkFullAttentionSpec: DenseReason.SINKS,
}


@dataclass(kw_only=True)
class MixedMetadata(CPUAttentionMetadata):
    """Of a step in which our core computes some requests. A step in which it computes none has
    the base backend's metadata, untouched."""

    plan: Plan
    parts: list[tuple[slice, CPUAttentionMetadata]]  # rows of each dense run, and how to do them
    build_whole: Callable[[], CPUAttentionMetadata]

    @cached_property
    def whole(self) -> CPUAttentionMetadata:
        """The base backend's metadata of the whole batch, for a layer that is all dense. Made
        at its first use, since most models have no such layer in this group."""
        return self.build_whole()


class SparsePrefillCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Makes the plan once per step, for all layers of a KV cache group."""

    # Decode rows come first, so that they are one run for the base backend.
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._worker = worker_of(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # Which layers are dense altogether is settled here, where the KV cache is known.
        reasons = {name: self._why_dense(layer) for name, layer in layers.items()}
        for name, reason in reasons.items():
            if reason is None:
                layers[name].impl.run_sparse(self._worker, name)
        self._core_from = self._worker.core_from(self.num_heads, self.head_dim, self.isa)
        self._open_layers = sum(reason is None for reason in reasons.values())
        self._dense_layers = Counter(reason for reason in reasons.values() if reason)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """The base backend's metadata, or a `MixedMetadata` if our core has a share."""
        common = common_attn_metadata

        def base(some: CommonAttentionMetadata) -> CPUAttentionMetadata:
            return CPUAttentionMetadataBuilder.build(self, common_prefix_len, some, fast_build)

        starts = common.query_start_loc_cpu.numpy()
        tokens = int(starts[-1])
        for reason, layers in self._dense_layers.items():
            self._worker.count_dense(reason, tokens * layers)
        if not self._open_layers:
            return base(common)
        if common.causal is not True:
            self._worker.count_dense(DenseReason.NON_CAUSAL, tokens * self._open_layers)
            return base(common)
        config = self._worker.setup.config
        plan = make_plan(
            starts,
            common.seq_lens.numpy(),
            min_query_tokens=config.min_query_tokens,
            min_prompt_tokens=config.min_prompt_tokens,
            core_from=self._core_from,
            prefilling=None if common.is_prefilling is None else common.is_prefilling.numpy(),
        )
        if not plan.core:
            self._worker.count_plan(plan, self._open_layers)
            return base(common)
        return MixedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            plan=plan,
            parts=[(slice(run.start, run.stop), base(_part(common, run))) for run in plan.dense],
            build_whole=lambda: base(common),
        )

    def _why_dense(self, layer: Any) -> DenseReason | None:
        """The reason for which a layer of this group is dense altogether; None: none."""
        spec = self.kv_cache_spec
        kind = layer.impl.traits.kind or KINDS.get(type(spec))
        if kind is None and layer.use_mm_prefix:
            kind = DenseReason.MULTIMODAL_PREFIX
        if kind is None and getattr(spec, "non_causal", False):
            kind = DenseReason.NON_CAUSAL
        traits = replace(
            layer.impl.traits,
            kind=kind,
            kv_layout=self.isa,
            quantized_kv=layer.impl.traits.quantized_kv or spec.dtype != self.dtype,
        )
        reason = why_dense(traits, capabilities(), enabled=self._worker.setup.config.enabled)
        # vLLM derives from this class for attention that sees another batch than we do, and
        # from the spec for what sees another part of the context.
        plain = type(self) is SparsePrefillCPUMetadataBuilder and type(spec) is FullAttentionSpec
        return reason if reason or plain else DenseReason.OTHER_ATTENTION


def _part(common: CommonAttentionMetadata, run: Run) -> CommonAttentionMetadata:
    """The batch that has only the requests of one run in it."""
    requests, rows = slice(run.first, run.last), slice(run.start, run.stop)
    starts = slice(run.first, run.last + 1)
    seq_lens = common.seq_lens[requests]
    query_start_loc = common.query_start_loc[starts] - run.start
    positions = common.positions
    return common.replace(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=common.query_start_loc_cpu[starts] - run.start,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=None,
        is_prefilling=None,
        num_reqs=run.last - run.first,
        num_actual_tokens=run.stop - run.start,
        max_query_len=int(query_start_loc.diff().max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[requests],
        slot_mapping=common.slot_mapping[rows],
        positions=None if positions is None else positions[rows],
    )
