"""The GPU backend on vLLM's FLASH_ATTN.

Follows vLLM 0.32's and 0.33's flash_attn.py, which agree in all that is used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_sparse_backend.backend.cuda import SparsePrefillBackend, SparsePrefillImpl
from vllm_sparse_backend.backend.cuda_metadata import MixedMetadata, PlanningBuilder


@dataclass
class MixedFlashMetadata(MixedMetadata, FlashAttentionMetadata):
    """FLASH_ATTN's, mixed."""


class SparsePrefillFlashMetadataBuilder(PlanningBuilder, FlashAttentionMetadataBuilder):
    """The planner."""

    mixed = MixedFlashMetadata


class SparsePrefillFlashImpl(SparsePrefillImpl, FlashAttentionImpl):
    """A layer."""


class SparsePrefillFlashBackend(SparsePrefillBackend, FlashAttentionBackend):
    """What vLLM instantiates the rest through."""

    @staticmethod
    def get_impl_cls() -> type[SparsePrefillFlashImpl]:
        """The layers' class."""
        return SparsePrefillFlashImpl

    @staticmethod
    def get_builder_cls() -> type[SparsePrefillFlashMetadataBuilder]:
        """The planner's class."""
        return SparsePrefillFlashMetadataBuilder


def available() -> bool:
    """Whether vLLM finds a flash-attn to run: never on ROCm, nor on GPUs before Ampere."""
    return get_flash_attn_version() is not None
