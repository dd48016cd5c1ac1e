"""The CPU backend through vLLM's own layers, builders and cache writer; no model, no engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _attention import assert_accurate, causal_mask, needs_core
from _batch import CPU, NAME, Batch, Group, engine_config, one_rank
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

from vllm_sparse_backend import compat
from vllm_sparse_backend.backend.cpu_metadata import MixedMetadata
from vllm_sparse_backend.backend.plan import DenseReason
from vllm_sparse_backend.backend.start import Setup
from vllm_sparse_backend.backend.worker import Worker, worker_of
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.errors import ProfileMismatch
from vllm_sparse_backend.metrics import read_totals
from vllm_sparse_backend.ops import paged_sparse_attention
from vllm_sparse_backend.ops.layout import unpack
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.selection import Dense, Policy, Sale, Static

pytestmark = needs_core

# (query tokens, tokens of context): decode, decode, short context, sparse from the start,
# sparse chunk, short query in a long context, sparse, decode
MIXED = [(1, 300), (1, 1500), (200, 200), (700, 700), (300, 1100), (16, 900), (129, 513), (1, 40)]
SPARSE = [3, 4, 6]
RUNS = [(0, 3), (5, 6), (7, 8)]
SMALL = {"min_prompt_tokens": 512, "dense_core": False}
STATIC = {**SMALL, "policy": {"selector": "static", "sink": 16, "local": 64}}
KEEP_ALL = {**SMALL, "policy": {"selector": "sale", "tau": 0.0}}


@pytest.fixture(scope="module", autouse=True)
def _parallel(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("parallel"), tiny_llama):
        yield


@pytest.fixture
def mixed(tiny_llama: Path) -> tuple[Group, Batch]:
    group = Group(engine_config(tiny_llama, STATIC))
    return group, group.batch(MIXED)


class Counted:
    """What was counted since this was made, without zeros."""

    def __init__(self, group: Group) -> None:
        self.directory = worker_of(group.config).counters.path.parent
        self.before = read_totals(self.directory).values

    def tokens(self) -> dict[str, int]:
        after = read_totals(self.directory).values
        grown = {key: value - self.before.get(key, 0) for key, value in after.items()}
        return {
            key[1] if key[1] == "keep_all" else key[2] or key[1]: int(value)
            for key, value in grown.items()
            if key[0] == "layer_tokens" and value
        }


def test_dense_rows_are_the_base_backends_bit_for_bit(mixed: tuple[Group, Batch]) -> None:
    group, batch = mixed
    out = group.forward(batch)
    for first, last in RUNS:
        rows = slice(batch.rows(first).start, batch.rows(last - 1).stop)
        assert torch.equal(out[rows], group.base(batch, requests=(first, last)))


def test_sparse_rows_are_the_ops(mixed: tuple[Group, Batch]) -> None:
    group, batch = mixed
    out = group.forward(batch)
    policy = Static(sink=16, local=64)
    want, _ = paged_sparse_attention(
        batch.q,
        batch.kv_cache,
        batch.common.block_table_tensor,
        batch.common.query_start_loc,
        batch.common.seq_lens,
        policy,
        requests=SPARSE,
        kv_layout=group.layers[0].isa,
        impl="reference",
    )
    for request in SPARSE:
        rows = batch.rows(request)
        torch.testing.assert_close(out[rows], want[rows], rtol=0.02, atol=0.02)
        assert not torch.equal(out[rows], group.base(batch)[rows])  # it was sparse indeed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 80), (2, 2, 128)])
def test_keep_all_is_dense_attention(
    tiny_llama: Path, dtype: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    config = engine_config(tiny_llama, KEEP_ALL, dtype=dtype)
    group = Group(config, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    batch = group.batch(MIXED)
    out = group.forward(batch)
    for request in SPARSE:
        query, context = batch.lengths[request]
        table = batch.common.block_table_tensor[request]
        k, v = unpack(batch.kv_cache, table, context, group.layers[0].isa)
        rows = batch.rows(request)
        assert_accurate(out[rows], (batch.q[rows], k, v), causal_mask(query, context))


def test_every_token_is_counted_once_with_its_reason(mixed: tuple[Group, Batch]) -> None:
    group, batch = mixed
    counted = Counted(group)
    group.forward(batch)
    assert counted.tokens() == {
        "sparse": 700 + 300 + 129,
        "decode": 3,
        "short_context": 200,
        "short_query": 16,
    }


def test_short_contexts_are_kept_whole_by_the_core(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, {**STATIC, "dense_core": True}))
    if group.layers[0].isa == "amx":
        pytest.skip("with the amx layout they are CPU_ATTN's")
    batch = group.batch([(1, 300), (448, 448), (64, 64), (700, 700)])
    counted = Counted(group)
    out = group.forward(batch)
    assert counted.tokens() == {"sparse": 700, "keep_all": 448, "decode": 1, "short_context": 64}
    rows = batch.rows(1)
    table = batch.common.block_table_tensor[1]
    k, v = unpack(batch.kv_cache, table, 448, group.layers[0].isa)
    assert_accurate(out[rows], (batch.q[rows], k, v), causal_mask(448, 448))
    for own in (0, 2):
        assert torch.equal(out[batch.rows(own)], group.base(batch, requests=(own, own + 1)))
    assert not torch.equal(out[batch.rows(3)], group.base(batch, requests=(3, 4)))


def test_tokens_are_counted_for_every_layer(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, STATIC), [{}, {"logits_soft_cap": 30.0}, {}])
    batch = group.batch([(1, 9), (600, 600)])
    counted = Counted(group)
    metadata = group.builder.build(0, batch.common)
    for layer in range(3):
        group.forward(batch, layer, metadata)
    assert counted.tokens() == {"sparse": 2 * 600, "decode": 2, "softcap": 601}

    counted = Counted(group)
    group.builder.build(0, group.batch([(1, 9), (100, 100)]).common)
    assert counted.tokens() == {"decode": 2, "short_context": 200, "softcap": 101}


@pytest.mark.parametrize("lengths", [[(1, 900), (1, 20)], [(300, 300)], [(511, 511), (63, 2000)]])
def test_a_step_without_sparse_requests_is_the_base_backends(
    tiny_llama: Path, lengths: list[tuple[int, int]]
) -> None:
    group = Group(engine_config(tiny_llama, STATIC))
    batch = group.batch(lengths)
    metadata = group.builder.build(0, batch.common)
    assert type(metadata) is CPUAttentionMetadata
    assert torch.equal(group.forward(batch, metadata=metadata), group.base(batch))


def test_a_dense_layer_takes_the_whole_of_a_mixed_batch(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, STATIC), [{}, {"logits_soft_cap": 30.0}])
    batch = group.batch(MIXED)
    metadata = group.builder.build(0, batch.common)
    assert isinstance(metadata, MixedMetadata)
    group.forward(batch, 0, metadata)
    assert "whole" not in vars(metadata)  # nobody has asked for it so far
    assert torch.equal(group.forward(batch, 1, metadata), group.base(batch, 1))


def test_padding_is_left_alone(mixed: tuple[Group, Batch]) -> None:
    group, batch = mixed
    want = group.forward(batch)
    starts = batch.common.query_start_loc
    starts = torch.cat((starts, starts[-1:].expand(2)))
    blank = torch.zeros(2, dtype=torch.int32)
    table = batch.common.block_table_tensor
    padded = Batch(
        batch.lengths,
        torch.cat((batch.q, batch.q[:5])),
        batch.kv_cache,
        batch.common.replace(
            num_reqs=len(MIXED) + 2,
            num_actual_tokens=len(batch.q) + 5,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.cat((batch.common.seq_lens, blank)),
            block_table_tensor=torch.cat((table, table[:2] * 0)),
        ),
    )
    out = group.forward(padded)
    assert torch.equal(out[: len(want)], want)
    assert bool(out[len(want) :].isnan().all())


def test_a_request_does_not_depend_on_its_neighbours(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, {**SMALL, "policy": {"selector": "sale", "tau": 0.01}}))
    together = group.batch(MIXED)
    out = group.forward(together)
    for request in SPARSE:
        alone = group.batch([MIXED[request]], seed=request)
        assert torch.equal(group.forward(alone), out[together.rows(request)])


def test_one_token_of_a_prompt_is_no_decode(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, STATIC))
    batch = group.batch([(1, 700), (1, 700), (200, 700)], prefilling=[True, False, False])
    counted = Counted(group)
    group.forward(batch)
    # The last is a request that was preempted and computes its own answer again.
    assert counted.tokens() == {"short_query": 1, "decode": 201}


def test_warm_up_writes_nothing(mixed: tuple[Group, Batch]) -> None:
    group, batch = mixed
    out = torch.full_like(batch.q, torch.nan)
    layer = group.layers[0]
    given = layer.impl.forward(layer, batch.q, batch.q, batch.q, torch.empty(0), None, out)
    assert given is out
    assert bool(out.isnan().all())


REASONS: list[tuple[DenseReason, dict[str, Any], dict[str, Any]]] = [
    (DenseReason.SLIDING_WINDOW, {"per_layer_sliding_window": 128}, {}),
    (DenseReason.SOFTCAP, {"logits_soft_cap": 20.0}, {}),
    (DenseReason.ALIBI, {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, {}),
    (DenseReason.SINKS, {"sinks": torch.zeros(4, dtype=torch.bfloat16)}, {}),
    (DenseReason.QUANTIZED_KV, {}, {"kv_cache_dtype": "fp8"}),
    (DenseReason.SWITCHED_OFF, {}, {"section": {**SMALL, "enabled": False}}),
]


@pytest.mark.parametrize(("reason", "layer", "engine"), REASONS, ids=[str(r[0]) for r in REASONS])
def test_a_layer_that_is_dense_says_why(
    tiny_llama: Path, reason: DenseReason, layer: dict[str, Any], engine: dict[str, Any]
) -> None:
    if reason == DenseReason.QUANTIZED_KV and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has no FP8 KV cache on a CPU without AVX-512")
    config = engine_config(tiny_llama, **{"section": STATIC, **engine})
    group = Group(config, [layer])
    lengths = [(1, 300), (600, 600)]
    counted = Counted(group)
    if reason == DenseReason.QUANTIZED_KV:  # its cache is of bytes: the counters tell enough
        group.builder.build(0, Group(engine_config(tiny_llama)).batch(lengths).common)
    else:
        batch = group.batch(lengths)
        assert torch.equal(group.forward(batch), group.base(batch))
    assert counted.tokens() == {str(reason): 601}


def test_head_sizes_that_the_core_lacks(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, STATIC), head_dim=32)
    batch = group.batch([(600, 600)])
    counted = Counted(group)
    assert torch.equal(group.forward(batch), group.base(batch))
    assert counted.tokens() == {"head_dim": 600}


def test_layers_that_share_kv(tiny_llama: Path) -> None:
    shared = {"kv_sharing_target_layer_name": NAME.format(0)}
    group = Group(engine_config(tiny_llama, STATIC), [{}, shared])
    batch = group.batch([(600, 600)])
    counted = Counted(group)
    metadata = group.builder.build(0, batch.common)
    group.forward(batch, 0, metadata)
    assert torch.equal(group.forward(batch, 1, metadata), group.base(batch, 1))
    assert counted.tokens() == {"sparse": 600, "kv_sharing": 600}


def test_attention_that_is_not_plainly_causal(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, STATIC)
    facts = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    chunked = ChunkedLocalAttentionSpec(**facts, attention_chunk_size=256)
    prefix_lm = FullAttentionSpec(**facts, non_causal=True)
    for spec, reason in ((chunked, "chunked_attention"), (prefix_lm, "non_causal")):
        group = Group(engine_config(tiny_llama, STATIC), spec=spec)
        counted = Counted(group)
        group.builder.build(0, group.batch([(600, 600)]).common)
        assert counted.tokens() == {reason: 600}
    group = Group(config)
    counted = Counted(group)
    batch = group.batch([(600, 600)])
    group.builder.build(0, batch.common.replace(causal=False))
    assert counted.tokens() == {"non_causal": 600}


def test_builders_that_vllm_derives_stay_dense(tiny_llama: Path) -> None:
    from vllm.model_executor.layers.attention.encoder_only_attention import (
        create_encoder_only_attention_backend,
    )

    group = Group(engine_config(tiny_llama, STATIC))
    derived = create_encoder_only_attention_backend(group.layers[0].get_attn_backend())
    group.builder = derived.get_builder_cls()(group.spec, group.names, group.config, CPU)
    batch = group.batch([(600, 600)])
    counted = Counted(group)
    assert type(group.builder.build(0, batch.common)) is CPUAttentionMetadata
    assert counted.tokens() == {"other_attention": 600}


def test_blocks_of_another_size(tiny_llama: Path) -> None:
    for size in (32, 48, 64):
        group = Group(engine_config(tiny_llama, KEEP_ALL, block_size=size))
        assert group.layers[0].isa in ("vec", "vec16", "amx")
        batch = group.batch([(1, 77), (600, 999)])
        rows = batch.rows(1)
        k, v = unpack(batch.kv_cache, batch.common.block_table_tensor[1], 999, group.layers[0].isa)
        out = group.forward(batch)[rows]
        assert_accurate(out, (batch.q[rows], k, v), causal_mask(600, 999))


FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)


def _worker(rank: int) -> Worker:
    policies: dict[int, dict[int, Policy]] = {
        1: {0: Dense(), 2: Static(local=64), 3: Sale(tau=0.5)}
    }
    profile = Profile.build(FACTS, policies, name="made", defaults=Sale(tau=0.25))
    return Worker(Setup(SparseConfig(), "avx2", profile), rank)


def test_ranks_take_their_own_heads_of_the_profile() -> None:
    everything = _worker(0).policies(NAME.format(1), 4, 64).rows
    assert everything == [Dense(), Sale(tau=0.25), Static(local=64), Sale(tau=0.5)]
    assert _worker(0).policies(NAME.format(1), 2, 64).rows == everything[:2]
    assert _worker(1).policies(NAME.format(1), 2, 64).rows == everything[2:]
    assert _worker(1).policies(NAME.format(0), 2, 64).rows == [Sale(tau=0.25)] * 2


def test_a_layer_with_more_heads_than_the_profile() -> None:
    with pytest.raises(ProfileMismatch, match=r"layers\.1\.self_attn.*the layer has 4"):
        _worker(1).policies(NAME.format(1), 3, 64)


def test_ranks_do_not_count_the_same_tokens_twice() -> None:
    for rank, want in ((0, 5), (1, 0)):
        worker = _worker(rank)
        before = read_totals(worker.counters.path.parent).values.get(
            ("layer_tokens", "dense", "mla")
        )
        worker.count_dense(DenseReason.MLA, 5, 1)
        after = read_totals(worker.counters.path.parent).values[("layer_tokens", "dense", "mla")]
        assert after - (before or 0) == want


def test_the_platform_chooses_the_backend_only_where_it_was_asked_for(tiny_llama: Path) -> None:
    sparse = Group(engine_config(tiny_llama))
    plain = Group(engine_config(tiny_llama, attention_backend="CPU_ATTN"))
    assert sparse.layers[0].get_attn_backend().__module__.startswith("vllm_sparse_backend.")
    assert plain.layers[0].get_attn_backend().__module__ == "vllm.v1.attention.backends.cpu_attn"
    assert sparse.layers[0].get_attn_backend().get_name() == "CPU_ATTN"
    assert compat.is_registered()
