"""What the backends of all platforms ask of vLLM's layers and batches: which layers can be sparse,
what of a step is planned so, and the part of a batch that is left to the base backend.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    SinkFullAttentionSpec,
)

from vllm_sparse_backend import compat, compat_requests
from vllm_sparse_backend.backend.plan import (
    DenseReason,
    LayerTraits,
    Plan,
    Run,
    make_plan,
    why_dense,
)
from vllm_sparse_backend.backend.start import capabilities
from vllm_sparse_backend.backend.worker import Worker

KINDS_OF_LAYERS = {
    AttentionType.ENCODER: DenseReason.ENCODER,
    AttentionType.ENCODER_ONLY: DenseReason.ENCODER,
    AttentionType.ENCODER_DECODER: DenseReason.CROSS_ATTENTION,
}
# Groups whose layers are no plain causal attention, whatever they say of themselves.
KINDS_OF_GROUPS: dict[type[Any], DenseReason] = {
    ChunkedLocalAttentionSpec: DenseReason.CHUNKED_ATTENTION,
    CrossAttentionSpec: DenseReason.CROSS_ATTENTION,
    EncoderOnlyAttentionSpec: DenseReason.ENCODER,
    SinkFullAttentionSpec: DenseReason.SINKS,
}
NO_WINDOW = (-1, (-1, -1))  # as the base backends of CPUs and of GPUs say it


def traits_of(impl: Any) -> LayerTraits:
    """What one of vLLM's impls, while its model is being built, tells of its layer."""
    model = get_current_vllm_config().model_config
    kind = KINDS_OF_LAYERS.get(impl.attn_type)
    if kind is None and getattr(impl, "chunk_lookback", -1) != -1:  # TRITON_ATTN only
        kind = DenseReason.CHUNKED_ATTENTION
    return LayerTraits(
        head_dim=impl.head_size,
        dtype=str(model.dtype).removeprefix("torch."),
        kind=kind,
        # Reference sliding window attention is a property of the model.
        sliding_window=impl.sliding_window not in NO_WINDOW or model.rswa_window is not None,
        sinks=impl.sinks is not None,
        softcap=bool(impl.logits_soft_cap),
        alibi=impl.alibi_slopes is not None,
        kv_sharing=impl.kv_sharing_target_layer_name is not None,
        draft=compat.is_draft_model(),
        context_parallel=impl.dcp_world_size > 1 or impl.pcp_world_size > 1,
        quantized_kv=impl.kv_quant_mode is not KVQuantMode.NONE,
    )


class LayerGroup:
    """The layers that share a builder: which of them can be sparse, and each step's plan.

    ``kv_layout``: of the cache, where that decides; ``derived``: the builder is of a class that
    vLLM made from ours, for attention that sees another batch than we do.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        worker: Worker,
        *,
        kv_layout: str | None = None,
        derived: bool = False,
    ) -> None:
        self._spec, self._worker = spec, worker
        self._kv_layout, self._derived = kv_layout, derived
        self._dtype = vllm_config.model_config.dtype
        compat_requests.watch_requests(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # Which layers are dense altogether is settled here, where the KV cache is known.
        reasons = {name: self._why_dense(layer) for name, layer in layers.items()}
        self.impls = {name: layers[name].impl for name, why in reasons.items() if why is None}
        for name, impl in self.impls.items():
            impl.run_sparse(worker, name)
        self._dense_layers = Counter(why for why in reasons.values() if why)

    def plan(
        self,
        common: CommonAttentionMetadata,
        seq_lens: npt.NDArray[np.integer[Any]] | None,
        *,
        min_query_tokens: int = 1,
        core_from: int | None = None,
    ) -> Plan | None:
        """The plan of a step, counted; None where all of it is the base backend's.

        ``seq_lens`` [R]: tokens of context, on the host; None: they are not known there.
        ``min_query_tokens``: at least so many make a request sparse, whatever is configured. The
        plan that is returned is counted by the layers that follow it. A batch that vLLM has made up
        for itself has no plan, and is not counted.
        """
        if compat_requests.is_made_up():
            return None
        starts = common.query_start_loc_cpu.numpy()
        tokens, requests = int(starts[-1]), int(np.count_nonzero(np.diff(starts)))
        for reason, layers in self._dense_layers.items():
            self._worker.count_dense(reason, tokens * layers, requests * layers)
        if not self.impls:
            return None
        if (reason_of_step := _why_dense_step(common)) is not None or seq_lens is None:
            reason = reason_of_step or DenseReason.OTHER_ATTENTION
            layers = len(self.impls)
            self._worker.count_dense(reason, tokens * layers, requests * layers)
            return None
        config = self._worker.setup.config
        least = max(min_query_tokens, config.min_query_tokens)
        count = len(starts) - 1
        plan = make_plan(
            starts,
            seq_lens,
            min_query_tokens=least,
            min_prompt_tokens=config.min_prompt_tokens,
            core_from=core_from,
            prefilling=_prefilling(common, count),
            # A step of short queries, as one of decode alone, is dense whatever is asked for.
            settings=compat_requests.settings(count) if common.max_query_len >= least else (),
        )
        if plan.core:
            return plan
        self._worker.count_plan(plan, len(self.impls))
        return None

    def _why_dense(self, layer: Any) -> DenseReason | None:
        """The reason for which a layer of this group is dense altogether; None: none."""
        spec, traits = self._spec, layer.impl.traits
        kind = traits.kind or KINDS_OF_GROUPS.get(type(spec))
        if kind is None and layer.use_mm_prefix:
            kind = DenseReason.MULTIMODAL_PREFIX
        if kind is None and getattr(spec, "non_causal", False):
            kind = DenseReason.NON_CAUSAL
        if kind is None and getattr(spec, "head_size_v", traits.head_dim) != traits.head_dim:
            kind = DenseReason.HEAD_DIM
        traits = replace(
            traits,
            kind=kind,
            kv_layout=self._kv_layout,
            quantized_kv=traits.quantized_kv or spec.dtype != self._dtype,
        )
        setup = self._worker.setup
        reason = why_dense(traits, capabilities(setup.platform), enabled=setup.config.enabled)
        # vLLM derives from the builders for attention that sees another batch than we do, and
        # from the spec for what sees another part of the context.
        plain = not self._derived and type(spec) is FullAttentionSpec
        return reason if reason or plain else DenseReason.OTHER_ATTENTION


def part(
    common: CommonAttentionMetadata, run: Run, seq_lens: npt.NDArray[np.integer[Any]]
) -> CommonAttentionMetadata:
    """The batch that has only the requests of one run in it.

    ``seq_lens``: as in `LayerGroup.plan`; nothing here waits for the device.
    """
    requests, rows = slice(run.first, run.last), slice(run.start, run.stop)
    starts = slice(run.first, run.last + 1)
    starts_cpu = common.query_start_loc_cpu[starts]
    positions = common.positions
    return common.replace(
        query_start_loc=common.query_start_loc[starts] - run.start,
        query_start_loc_cpu=starts_cpu - run.start,
        seq_lens=common.seq_lens[requests],
        seq_lens_cpu_upper_bound=None,
        is_prefilling=None,
        num_reqs=run.last - run.first,
        num_actual_tokens=run.stop - run.start,
        max_query_len=int(np.diff(starts_cpu.numpy()).max()),
        max_seq_len=int(seq_lens[requests].max()),
        block_table_tensor=common.block_table_tensor[requests],
        slot_mapping=common.slot_mapping[rows],
        positions=None if positions is None else positions[rows],
        # Of the whole batch, where somebody has asked for them already.
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def _why_dense_step(common: CommonAttentionMetadata) -> DenseReason | None:
    if common.causal is not True:  # a tensor says it of each request
        return DenseReason.NON_CAUSAL
    return DenseReason.MULTIMODAL_PREFIX if common.mm_req_doc_ranges is not None else None


def _prefilling(common: CommonAttentionMetadata, count: int) -> npt.NDArray[np.bool_] | None:
    """Of each of the ``count`` requests; model runner V2 says it of those that are no padding."""
    if common.is_prefilling is None:
        return None
    told = common.is_prefilling.numpy()
    prefilling = np.zeros(count, dtype=bool)
    prefilling[: len(told)] = told[:count]
    return prefilling
