"""The GPU backend's classes on tensors of the host: layers of one KV cache group, and batches.

Builders, metadata and impls are vLLM's own and ours; only kernels are missing, vLLM's and, unless
Triton's interpreter runs them, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from _batch import CPU, NAME
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sparse_backend.backend.cuda_flash import SparsePrefillFlashBackend
from vllm_sparse_backend.backend.cuda_triton import SparsePrefillTritonBackend
from vllm_sparse_backend.backend.start import GPU_CORE
from vllm_sparse_backend.backend.worker import worker_of
from vllm_sparse_backend.control import Setting

BACKENDS: dict[str, Any] = {
    "flash": SparsePrefillFlashBackend,
    "triton": SparsePrefillTritonBackend,
}
PAGE = 16


@dataclass(frozen=True)
class Request:
    """One request's share of a step."""

    rows: int
    context: int
    prefilling: bool


@dataclass
class Told:
    """What a model runner knows of the requests of a batch: who they are, and their prompts."""

    identity: list[int]
    lens: list[int]

    def prompt_lens(self, num_reqs: int) -> torch.Tensor:
        """As compat_requests.Told."""
        return torch.tensor(self.lens, dtype=torch.int32)[:num_reqs]

    def settings(self, num_reqs: int) -> list[Setting]:
        """Nobody asks for anything."""
        return []

    def identities(self, num_reqs: int) -> list[int]:
        """As compat_requests.Told."""
        return self.identity[:num_reqs]


def common_of(
    requests: Sequence[Request],
    *,
    padding: tuple[int, int] = (0, 0),
    tells_padding: bool = True,
    seed: int = 0,
) -> CommonAttentionMetadata:
    """What a model runner tells of a batch, with ``padding`` requests and tokens behind it.

    ``tells_padding``: whether `is_prefilling` is as long as the padded batch; model runner V2's is
    not.
    """
    g = torch.Generator().manual_seed(seed)
    more_requests, more_tokens = padding
    rows = [it.rows for it in requests] + [0] * more_requests
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    context = torch.tensor([it.context for it in requests] + [0] * more_requests, dtype=torch.int32)
    told = [it.prefilling for it in requests] + [False] * (more_requests if tells_padding else 0)
    tokens = int(starts[-1]) + more_tokens
    pages = -(-int(context.max()) // PAGE) + 1
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=context,
        seq_lens_cpu_upper_bound=context.clone(),
        num_reqs=len(rows),
        num_actual_tokens=tokens,
        max_query_len=max(rows),
        max_seq_len=int(context.max()),
        block_table_tensor=torch.randint(
            1, 100, (len(rows), pages), generator=g, dtype=torch.int32
        ),
        slot_mapping=torch.randint(0, 1000, (tokens,), generator=g),
        is_prefilling=torch.tensor(told, dtype=torch.bool),
    )


class GpuGroup:
    """Layers of one KV cache group under the sparse GPU backend on ``base``; also its builder, and
    the base's own."""

    def __init__(
        self,
        config: VllmConfig,
        base: str,
        layers: Sequence[dict[str, Any]] = ({},),
        head_dim: int = 64,
        spec: AttentionSpec | None = None,
    ) -> None:
        # As a GPU's worker resolves it.
        worker = worker_of(config)
        isa = GPU_CORE if worker.setup.config.enabled else worker.setup.isa
        worker.setup = replace(worker.setup, platform="cuda", isa=isa)
        self.config, self.heads, self.kv_heads, self.head_dim = config, 4, 2, head_dim
        self.dtype = config.model_config.dtype
        self.backend = BACKENDS[base]
        self.names = [NAME.format(index) for index in range(len(layers))]
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with set_current_vllm_config(config):
                self.layers: list[Any] = [
                    Attention(
                        self.heads,
                        head_dim,
                        head_dim**-0.5,
                        num_kv_heads=self.kv_heads,
                        cache_config=config.cache_config,
                        prefix=name,
                        attn_backend=self.backend,
                        **options,
                    )
                    for name, options in zip(self.names, layers, strict=True)
                ]
        finally:
            torch.set_default_dtype(default)
        self.spec = spec or FullAttentionSpec(
            block_size=PAGE, num_kv_heads=self.kv_heads, head_size=head_dim, dtype=self.dtype
        )
        self.builder = self.backend.get_builder_cls()(self.spec, self.names, config, CPU)
        self.base_builder = base_of(self.backend.get_builder_cls())(
            self.spec, self.names, config, CPU
        )

    def forward(
        self,
        metadata: Any,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
        layer: int = 0,
    ) -> None:
        """One layer's step into ``out``. K and V of the step are in the cache: they are None."""
        impl = self.layers[layer].impl
        assert impl.forward(self.layers[layer], q, None, None, kv_cache, metadata, out) is out


def base_of(ours: type[Any]) -> type[Any]:
    """The class of vLLM's that ours is put before."""
    return next(it for it in ours.__mro__ if it.__module__.startswith("vllm.v1.attention.backends"))


def assert_same(ours: Any, base: Any) -> None:
    """Every field of the base's metadata is the same in ours."""
    for field in fields(base):
        one, other = getattr(ours, field.name), getattr(base, field.name)
        if isinstance(other, torch.Tensor) and not field.name.startswith("softmax_segm"):
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        elif not isinstance(other, torch.Tensor):  # the others are scratch
            assert one == other, field.name
