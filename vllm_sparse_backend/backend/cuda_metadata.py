"""The plan of each step beside the base backend's metadata, on GPUs; for any base backend."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_sparse_backend import compat_requests
from vllm_sparse_backend.backend.group import LayerGroup, part
from vllm_sparse_backend.backend.plan import Plan
from vllm_sparse_backend.backend.tally import TileTally
from vllm_sparse_backend.backend.worker import worker_of
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.ops import PolicyTable
from vllm_sparse_backend.ops import triton as kernels
from vllm_sparse_backend.ops.listed import rehearse

logger = logging.getLogger("vllm.sparse_prefill")


@dataclass(kw_only=True)
class MixedMetadata:
    """Added to the base backend's metadata of a step in which our kernels compute some requests.

    What it is added to stays that of the whole batch: a layer that is all dense goes by it alone.
    A step in which our kernels compute nothing has the base backend's metadata, untouched.
    """

    plan: Plan
    parts: list[tuple[slice, Any]]  # rows of each dense run, and the base's metadata of it
    works: list[tuple[float, Any]]  # threshold scale, kernels.Work: what is sparse, in parts
    tally: TileTally


class PlanningBuilder(AttentionMetadataBuilder[Any]):
    """Makes the plan once per step, for all layers of a KV cache group; stands before a base
    backend's builder among a class's bases.
    """

    mixed: ClassVar[type[Any]]  # the base's metadata with MixedMetadata
    # Model runner V1 would hand one group's metadata on to another with the block table changed.
    # The parts and the counts of the other group's layers would be missing.
    supports_update_block_table: bool = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._worker = worker_of(vllm_config)
        # A class that vLLM derives from ours has no `mixed` of its own.
        derived = "mixed" not in vars(type(self))
        self._group = LayerGroup(
            kv_cache_spec, layer_names, vllm_config, self._worker, derived=derived
        )
        # Whatever vLLM may take for decode is: it may be in a CUDA graph, and under asynchronous
        # scheduling its context is not known on the host.
        self._min_query_tokens = max_decode_query_len(vllm_config) + 1
        self._planning = True
        self._untold = compat_requests.why_untold(vllm_config)
        self._most_keys = vllm_config.model_config.max_model_len
        tables = {name: impl.policies for name, impl in self._group.impls.items()}
        event = torch.cuda.Event() if device.type == "cuda" else None
        self._tally = TileTally(tables, device, event)
        if tables:
            # Decode rows come first, so that they are one run for the base backend. Model runner
            # V2 always sorts; V1 only for who asks.
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._shelf = self._keep_codes(layer_names, vllm_config)
        if tables:
            self._warm_up(tables)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """The base's, but no more than batches that are decode alone: a graph has no plan."""
        base = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(base, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """The base backend's metadata; also a `MixedMetadata` if our kernels have a share."""
        common = common_attn_metadata
        whole = super().build(common_prefix_len, common, fast_build)
        if not self._planning:
            return whole
        for name, tiles in self._tally.take().items():
            self._worker.count_computed(name, tiles)
        upper_bound = common.seq_lens_cpu_upper_bound  # exact for prompts
        seq_lens = None if upper_bound is None else upper_bound.numpy()
        plan = self._group.plan(common, seq_lens, min_query_tokens=self._min_query_tokens)
        if plan is None or seq_lens is None:
            return whole
        # A part has no schedule made ahead (fast_build): FLASH_ATTN keeps that of a step in one
        # buffer, where those of several parts would overwrite each other.
        parts = [
            (
                slice(run.start, run.stop),
                super(PlanningBuilder, self).build(0, part(common, run, seq_lens), True),
            )
            for run in plan.dense
        ]
        starts = common.query_start_loc_cpu.numpy()
        return self.mixed(
            **{field.name: getattr(whole, field.name) for field in fields(whole)},
            plan=plan,
            parts=parts,
            works=self._works(plan, starts, seq_lens, self._prompts(common.num_reqs)),
            tally=self._tally,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """The base backend's: what is captured is replayed for other batches."""
        with self._unplanned():
            return super().build_for_cudagraph_capture(common_attn_metadata)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> Any:
        """The base backend's: a draft's layers are dense, also where they share our builder."""
        with self._unplanned():
            return super().build_for_drafting(common_attn_metadata, draft_index)

    def _works(
        self,
        plan: Plan,
        starts: npt.NDArray[np.integer[Any]],
        seq_lens: npt.NDArray[np.integer[Any]],
        prompts: npt.NDArray[np.int32] | None,
    ) -> list[tuple[float, Any]]:
        """What the kernels are to do, by the scale of thresholds: first for the requests whose
        codes are kept, then for the others."""
        places = self._places(plan, starts, seq_lens, prompts)
        return [
            (scale, work)
            for scale, requests in plan.calls
            for kept in (True, False)
            for work in kernels.plan_works(
                starts,
                seq_lens,
                [r for r in requests if (r in places) == kept],
                self.device,
                self._most_keys,
                prompts,
                places if kept else None,
            )
        ]

    def _places(
        self,
        plan: Plan,
        starts: npt.NDArray[np.integer[Any]],
        seq_lens: npt.NDArray[np.integer[Any]],
        prompts: npt.NDArray[np.int32] | None,
    ) -> dict[int, Any]:
        """Of the step's sparse requests those whose codes are kept, and where."""
        told = None if self._shelf is None else compat_requests.identities(len(seq_lens))
        if self._shelf is None or told is None or prompts is None:
            return {}
        self._shelf.step()
        places = {
            r: self._shelf.place(
                told[r], int(seq_lens[r] - np.diff(starts)[r]), int(seq_lens[r]), int(prompts[r])
            )
            for r in plan.core
            if told[r] != compat_requests.NOBODY
        }
        return {r: place for r, place in places.items() if place is not None}

    def _keep_codes(self, layer_names: list[str], vllm_config: VllmConfig) -> Any:
        """A shelf and, in each layer, room for what lies on it; None where nothing is kept."""
        streams, impls = self._worker.setup.config.kept_prompts, self._group.impls
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # Microbatches have builders of their own, which know nothing of each other's places.
        cut = vllm_config.parallel_config.use_ubatching
        for name, layer in layers.items():
            if name not in impls or cut:
                layer.impl.keep_nothing()
        if not (streams and impls):
            return None
        if cut:
            logger.warning(
                "sparse_prefill: kept_prompts: nothing is kept, since batches are cut into "
                "microbatches (dual batch overlap)"
            )
            return None
        size = sum(impl.keep_codes(self.device) for impl in impls.values())
        logger.info(
            "sparse_prefill: keys' codes of %d prompts kept from chunk to chunk, %.2f GiB",
            streams,
            size / 2**30,
        )
        return kernels.Shelf(streams, self._most_keys)

    def _prompts(self, num_reqs: int) -> npt.NDArray[np.int32] | None:
        """The lengths of the batch's prompts, [num_reqs]; None: nobody tells."""
        # Where it was cut into microbatches, what is told is of another batch than this.
        told = None if self._untold else compat_requests.prompt_lens(num_reqs)
        return None if told is None else told.numpy()

    @contextmanager
    def _unplanned(self) -> Iterator[None]:
        self._planning = False
        try:
            yield
        finally:
            self._planning = True

    def _warm_up(self, tables: Mapping[str, PolicyTable]) -> None:
        """Compile what these tables can ask for, so that no request waits for a compiler.

        Raises what list selectors raise, and SparsePrefillError.
        """
        impl = self._group.impls[next(iter(tables))]
        for table in tables.values():  # on the device, which a selector may know nothing of
            rehearse(table, impl.head_size, self.device)
        spec: AttentionSpec = self.kv_cache_spec
        try:
            seconds = kernels.warm_up(
                impl.num_heads,
                impl.num_kv_heads,
                impl.head_size,
                spec.dtype,
                spec.block_size,
                [(table, self._group.impls[name].kept) for name, table in tables.items()],
                self.device,
            )
        # Whatever a compiler or driver raises: it is the answer to whether the kernels run here.
        except Exception as error:
            raise SparsePrefillError(
                f"the kernels cannot be compiled for {self.device} ({type(error).__name__}: "
                f"{error}); choose another --attention-backend"
            ) from error
        logger.info("sparse_prefill: kernels compiled in %.1f s", seconds)
