"""The GPU backend on vLLM's TRITON_ATTN: where FLASH_ATTN is missing, as on ROCm and on GPUs before
Ampere, or cannot do what is asked, as for fp32.

Follows vLLM 0.32's and 0.33's triton_attn.py, which agree in all that is used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from vllm_sparse_backend.backend.cuda import SparsePrefillBackend, SparsePrefillImpl
from vllm_sparse_backend.backend.cuda_metadata import MixedMetadata, PlanningBuilder


@dataclass
class MixedTritonMetadata(MixedMetadata, TritonAttentionMetadata):
    """TRITON_ATTN's, mixed."""


class SparsePrefillTritonMetadataBuilder(PlanningBuilder, TritonAttentionMetadataBuilder):
    """The planner."""

    mixed = MixedTritonMetadata


class SparsePrefillTritonImpl(SparsePrefillImpl, TritonAttentionImpl):
    """A layer."""


class SparsePrefillTritonBackend(SparsePrefillBackend, TritonAttentionBackend):
    """What vLLM instantiates the rest through."""

    @staticmethod
    def get_impl_cls() -> type[SparsePrefillTritonImpl]:
        """The layers' class."""
        return SparsePrefillTritonImpl

    @staticmethod
    def get_builder_cls() -> type[SparsePrefillTritonMetadataBuilder]:
        """The planner's class."""
        return SparsePrefillTritonMetadataBuilder
