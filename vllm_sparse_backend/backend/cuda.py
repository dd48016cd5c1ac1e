"""The GPU backend: vLLM's own FLASH_ATTN or TRITON_ATTN, but for the rows that are planned sparse.

NVIDIA's and AMD's GPUs alike. What is put before a base backend's classes; `cuda_flash` and
`cuda_triton` put it there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl

from vllm_sparse_backend.backend import observe
from vllm_sparse_backend.backend.cuda_metadata import MixedMetadata
from vllm_sparse_backend.backend.group import traits_of
from vllm_sparse_backend.backend.plan import LayerTraits, why_dense
from vllm_sparse_backend.backend.start import capabilities
from vllm_sparse_backend.backend.worker import Worker, listed_of
from vllm_sparse_backend.config import load_config
from vllm_sparse_backend.ops import triton as kernels


class SparsePrefillImpl(AttentionImpl[Any]):
    """The attention of one layer: the base's unless told otherwise by the layer's builder; stands
    before a base backend's impl among a class's bases.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.traits = traits_of(self)
        self._vllm_config = vllm_config = get_current_vllm_config()
        self._max_model_len = vllm_config.model_config.max_model_len
        config = load_config(vllm_config.additional_config)
        self._kept_prompts = config.kept_prompts
        self._least = config.min_query_tokens, config.min_prompt_tokens  # of a sparse request
        self._max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._may_keep = config.kept_prompts > 0 and config.enabled
        self._reserved: torch.Tensor | None = None
        self._chosen_rows = 0
        self._kept: kernels.KeptCodes | None = None
        self._sparse: tuple[Worker, str] | None = None

    def run_sparse(self, worker: Worker, layer_name: str) -> None:
        """Follow the steps' plans from now on, under the policies of this layer."""
        self._sparse = worker, layer_name
        self._tables = worker.tables(layer_name, self.num_heads, self.head_size)
        self.policies = self._tables(1.0)

    def keep_codes(self, device: torch.device) -> int:
        """Have room for the codes of so many prompts as are configured; after `run_sparse`.

        Returns its bytes.
        """
        self.keep_nothing()  # what was reserved is there to be taken
        shape = self._kept_prompts, self._max_model_len, self.num_kv_heads, self.head_size
        bits = kernels.heads_of(self.policies, device).bits
        self._kept = kernels.KeptCodes(*shape, bits, device)
        return self._kept.nbytes

    @property
    def kept(self) -> kernels.KeptCodes | None:
        """The codes of prompts in progress; None: none are kept."""
        return self._kept

    def keep_nothing(self) -> None:
        """Give back what is reserved for codes, as where this layer turns out to be dense."""
        self._reserved, self._may_keep = None, False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: our kernels write what the base's would have to quantize."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step into ``output``; shapes as in the base class.

        K and V of the step are in ``kv_cache`` already. ``key`` and ``value`` are None where a
        fused kernel has written them (vLLM 0.33).
        """
        mixed = attn_metadata if isinstance(attn_metadata, MixedMetadata) else None
        if attn_metadata is None:  # vLLM looks how much memory a step takes, and a cache may have
            self._take_workspace(layer, query)
        if mixed is None or self._sparse is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sparse_prefill: fused output quantization")
        worker, name = self._sparse
        for rows, metadata in mixed.parts:
            super().forward(
                layer,
                query[rows],
                None if key is None else key[rows],
                None if value is None else value[rows],
                kv_cache,
                metadata,
                output[rows],
            )
        observe.show(name, attn_metadata, query, kv_cache, self.scale, "strided")
        tiles = [
            kernels.forward(
                query,
                kv_cache,
                attn_metadata.block_table,
                work,
                self._tables(scale),
                self.scale,
                output,
                kept=self._kept if work.kept else None,
            )
            for scale, work in mixed.works
        ]
        mixed.tally.add(name, tiles[0] if len(tiles) == 1 else torch.stack(tiles).sum(0))
        worker.count_plan(mixed.plan)
        for _, work in mixed.works:
            worker.count_causal(name, work.causal(self.policies), self.policies)
        return output

    def _take_workspace(self, layer: Any, query: torch.Tensor) -> None:
        """Allocate, and give back, what a step of so many rows may take at the longest context;
        and, to hold it until it is known whether this layer is sparse, what is kept of prompts."""
        self._choose(layer, query)
        rows, keys = query.shape[0], self._max_model_len
        of_layer = self.num_heads, self.num_kv_heads, self.head_size
        size = kernels.workspace(rows, keys, *of_layer, self.most_requests(rows))
        torch.empty(size, dtype=torch.uint8, device=query.device)
        if self._may_keep and self._reserved is None and _may_be_sparse(self.traits):
            # Of one number of bits: more in one layer are rare.
            shape = self._kept_prompts, keys, self.num_kv_heads, self.head_size
            size = kernels.kept_bytes(*shape)
            self._reserved = torch.empty(size, dtype=torch.uint8, device=query.device)

    def most_requests(self, rows: int) -> int:
        """How many sparse requests of ``rows`` query tokens are computed at a time, at most: those
        of a step are taken in parts of max_model_len tokens of context, or one by one."""
        least_rows, least_keys = self._least
        by_length = min(rows // least_rows, self._max_model_len // least_keys)
        return max(1, min(by_length, self._max_num_seqs))

    def _choose(self, layer: Any, query: torch.Tensor) -> None:
        """Have list selectors take what they take for such a step, which nobody else can say."""
        rows = min(query.shape[0], self._max_model_len)
        if rows <= self._chosen_rows or not _may_be_sparse(self.traits):
            return
        self._chosen_rows = rows
        if table := listed_of(self._vllm_config, layer.layer_name, self.num_heads):
            keys, kv_heads = self._max_model_len, self.num_kv_heads
            kernels.choose_of_zeros(query[:rows], kv_heads, keys, table, self.scale)


def _may_be_sparse(traits: LayerTraits) -> bool:
    return why_dense(traits, capabilities("cuda")) is None


class SparsePrefillBackend(AttentionBackend):
    """What vLLM instantiates the rest through; stands before a base backend among a class's bases,
    whose name and abilities it has: vLLM compares the one and asks for the other.
    """

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: plans and their dense parts go by the lengths on the host."""
        return False


def backends() -> list[type[SparsePrefillBackend]]:
    """Those there are, best first."""
    from vllm_sparse_backend.backend.cuda_flash import SparsePrefillFlashBackend, available
    from vllm_sparse_backend.backend.cuda_triton import SparsePrefillTritonBackend

    flash = [SparsePrefillFlashBackend] if available() else []
    return [*flash, SparsePrefillTritonBackend]


def backend_for(selector_config: Any, capability: Any) -> type[SparsePrefillBackend]:
    """The best that can serve a layer, by the base backends' own word.

    ``selector_config``: vLLM's AttentionSelectorConfig; ``capability``: the device's. Raises
    ValueError with the reasons, as vLLM does, if there is none.
    """
    reasons = {}
    for backend in backends():
        why_not = backend.validate_configuration(
            device_capability=capability, **selector_config._asdict()
        )
        if not why_not:
            return backend
        reasons[backend.get_name()] = why_not
    raise ValueError(f"sparse_prefill is not valid for this configuration. Reasons: {reasons}")
