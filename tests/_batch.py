"""One layer group of a model in vLLM's own classes, and batches for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

NAME = "model.layers.{}.self_attn.attn"
CPU = torch.device("cpu")


def engine_config(model: Any, section: dict[str, Any] | None = None, **more: Any) -> VllmConfig:
    """vLLM's configuration of a server with the sparse backend."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "attention_backend": "sparse_prefill",
        "additional_config": {"sparse_prefill": section or {}},
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_num_batched_tokens": 8192,
        **more,
    }
    return EngineArgs(**arguments).create_engine_config()


@contextmanager
def one_rank(folder: Path, model: Path) -> Iterator[None]:
    """A process that is a server's only rank, which vLLM's layers ask for."""
    with set_current_vllm_config(engine_config(model)):
        init_distributed_environment(1, 0, f"file://{folder / 'meeting'}", 0, "gloo")
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()


@dataclass
class Batch:
    """Requests as (query tokens, tokens of context), their K and V in a paged cache."""

    lengths: list[tuple[int, int]]
    q: torch.Tensor
    kv_cache: torch.Tensor
    common: CommonAttentionMetadata

    def rows(self, request: int) -> slice:
        """The request's rows of q and of the output."""
        starts = self.common.query_start_loc.tolist()
        return slice(starts[request], starts[request + 1])

    def only(self, first: int, last: int) -> CommonAttentionMetadata:
        """The batch in which only the requests from ``first`` to before ``last`` are."""
        starts = self.common.query_start_loc[first : last + 1]
        seq_lens = self.common.seq_lens[first:last]
        return self.common.replace(
            query_start_loc=starts - starts[0],
            query_start_loc_cpu=starts - starts[0],
            seq_lens=seq_lens,
            num_reqs=last - first,
            num_actual_tokens=int(starts[-1] - starts[0]),
            max_query_len=int(starts.diff().max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.common.block_table_tensor[first:last],
            slot_mapping=self.common.slot_mapping[int(starts[0]) : int(starts[-1])],
            is_prefilling=None,
        )


class Group:
    """Layers of one KV cache group under the sparse backend, and one under vLLM's own."""

    def __init__(
        self,
        config: VllmConfig,
        layers: Sequence[dict[str, Any]] = ({},),
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        spec: AttentionSpec | None = None,
    ) -> None:
        self.config, self.heads, self.kv_heads, self.head_dim = config, heads, kv_heads, head_dim
        self.dtype = config.model_config.dtype
        self.names = [NAME.format(index) for index in range(len(layers))]
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with set_current_vllm_config(config):
                self.layers: list[Any] = [
                    Attention(
                        heads,
                        head_dim,
                        head_dim**-0.5,
                        num_kv_heads=kv_heads,
                        cache_config=config.cache_config,
                        prefix=name,
                        **options,
                    )
                    for name, options in zip(self.names, layers, strict=True)
                ]
                self.base_impls = [
                    CPUAttentionBackendImpl(
                        heads,
                        head_dim,
                        head_dim**-0.5,
                        kv_heads,
                        options.get("alibi_slopes"),
                        options.get("per_layer_sliding_window"),
                        config.cache_config.cache_dtype,
                        options.get("logits_soft_cap"),
                        kv_sharing_target_layer_name=options.get("kv_sharing_target_layer_name"),
                        sinks=options.get("sinks"),
                    )
                    for options in layers
                ]
        finally:
            torch.set_default_dtype(default)
        found = spec or self.layers[0].get_kv_cache_spec(config)
        assert isinstance(found, AttentionSpec)
        self.spec = found
        backend = self.layers[0].get_attn_backend()
        self.base_builder = CPUAttentionMetadataBuilder(found, self.names, config, CPU)
        self.builder = backend.get_builder_cls()(found, self.names, config, CPU)

    def batch(
        self, lengths: list[tuple[int, int]], prefilling: list[bool] | None = None, seed: int = 0
    ) -> Batch:
        """Random q, K and V; K and V written to shuffled pages by vLLM's own kernel."""
        g = torch.Generator().manual_seed(seed)
        size = self.spec.block_size
        pages = [-(-context // size) for _, context in lengths]
        order = torch.randperm(sum(pages), generator=g).int() + 1
        table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
        for row, own in zip(table, order.split(pages), strict=True):
            row[: len(own)] = own
        kv_cache = torch.zeros(
            sum(pages) + 1, self.kv_heads, size, 2 * self.head_dim, dtype=self.dtype
        )
        for r, (_, context) in enumerate(lengths):
            position = torch.arange(context)
            slots = table[r].long()[position // size] * size + position % size
            # Of the request alone, so that batches of other requests have the same K and V.
            own_g = torch.Generator().manual_seed(1000 * context + lengths[r][0])
            k, v = torch.randn(2, context, self.kv_heads, self.head_dim, generator=own_g)
            k, v = (2 * k).to(self.dtype), v.to(self.dtype)
            impl = self.layers[0].impl
            impl.do_kv_cache_update(self.layers[0], k, v, kv_cache, slots)
        rows = torch.tensor([0] + [query for query, _ in lengths]).cumsum(0).int()
        q = torch.cat([self._query(query, context) for query, context in lengths])
        seq_lens = torch.tensor([context for _, context in lengths], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=rows,
            query_start_loc_cpu=rows,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(lengths),
            num_actual_tokens=int(rows[-1]),
            max_query_len=max(query for query, _ in lengths),
            max_seq_len=max(context for _, context in lengths),
            block_table_tensor=table,
            slot_mapping=torch.zeros(int(rows[-1]), dtype=torch.int64),
            is_prefilling=None if prefilling is None else torch.tensor(prefilling),
        )
        return Batch(lengths, q, kv_cache, common)

    def _query(self, rows: int, context: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(7 * rows + context)
        return (2 * torch.randn(rows, self.heads, self.head_dim, generator=g)).to(self.dtype)

    def forward(self, batch: Batch, layer: int = 0, metadata: Any = None) -> torch.Tensor:
        """The layer's output; rows that nobody writes are NaN."""
        metadata = metadata or self.builder.build(0, batch.common)
        return self._run(self.layers[layer].impl, layer, batch.q, batch.kv_cache, metadata)

    def base(
        self, batch: Batch, layer: int = 0, requests: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """vLLM's own backend on the batch, or on the requests from one to before another."""
        first, last = requests or (0, len(batch.lengths))
        common = batch.only(first, last) if requests else batch.common
        metadata: CPUAttentionMetadata = self.base_builder.build(0, common)
        q = batch.q[batch.rows(first).start : batch.rows(last - 1).stop]
        return self._run(self.base_impls[layer], layer, q, batch.kv_cache, metadata)

    def _run(
        self, impl: Any, layer: int, q: torch.Tensor, kv_cache: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        # K and V of the step are in the cache; what is passed beside it must not be read.
        trap = torch.full((len(q), self.kv_heads, self.head_dim), torch.nan, dtype=self.dtype)
        out = torch.full_like(q, torch.nan)
        given = impl.forward(self.layers[layer], q, trap, trap, kv_cache, metadata, out)
        assert given is out
        return out
