"""The plan of each step beside the base backend's metadata. Follows vLLM 0.32's cpu_attn.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparse_backend import compat_requests
from vllm_sparse_backend.backend.group import LayerGroup, part
from vllm_sparse_backend.backend.plan import Plan
from vllm_sparse_backend.backend.worker import worker_of


@dataclass(kw_only=True)
class MixedMetadata(CPUAttentionMetadata):
    """Of a step in which our core computes some requests. A step in which it computes none has
    the base backend's metadata, untouched."""

    plan: Plan
    parts: list[tuple[slice, CPUAttentionMetadata]]  # rows of each dense run, and how to do them
    build_whole: Callable[[], CPUAttentionMetadata]
    prompt_lens: torch.Tensor | None  # int32 [R]; None: not known

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
        self._group = LayerGroup(
            kv_cache_spec,
            layer_names,
            vllm_config,
            self._worker,
            kv_layout=self.isa,
            derived=type(self) is not SparsePrefillCPUMetadataBuilder,
        )
        self._core_from = self._worker.core_from(self.num_heads, self.head_dim, self.isa)

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

        seq_lens = common.seq_lens.numpy()
        plan = self._group.plan(common, seq_lens, core_from=self._core_from)
        if plan is None:
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
            parts=[
                (slice(run.start, run.stop), base(part(common, run, seq_lens)))
                for run in plan.dense
            ],
            build_whole=lambda: base(common),
            prompt_lens=compat_requests.prompt_lens(common.num_reqs),
        )
