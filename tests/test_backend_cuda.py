"""The GPU backend through vLLM's own layers and builders, on tensors of the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _batch import CPU, NAME, engine_config, one_rank
from _gpu_batch import PAGE, GpuGroup, Request, assert_same, base_of, common_of
from _gpu_orders import v1_order, v2_order
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from vllm.compilation.backends import set_model_tag
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn, triton_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse_backend.backend import observe
from vllm_sparse_backend.backend.cuda_metadata import MixedMetadata
from vllm_sparse_backend.backend.tally import TileTally
from vllm_sparse_backend.backend.worker import worker_of
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.metrics import read_totals
from vllm_sparse_backend.metrics.counters import CAUSAL, COMPUTED, LAYER_TOKENS
from vllm_sparse_backend.ops import PolicyTable
from vllm_sparse_backend.ops import triton as kernels
from vllm_sparse_backend.selection import Dense, Static

BASES = ("flash", "triton")
MIN_QUERY, MIN_PROMPT = 64, 512
SECTION = {"min_prompt_tokens": MIN_PROMPT, "policy": {"selector": "static"}}
# decode, decode, short context, sparse, sparse chunk, short query, sparse, decode
MIXED = [
    Request(1, 300, False),
    Request(1, 1500, False),
    Request(200, 200, True),
    Request(700, 700, True),
    Request(300, 1100, True),
    Request(16, 900, True),
    Request(129, 513, True),
    Request(1, 40, False),
]
SPARSE = [3, 4, 6]


@pytest.fixture(scope="module", autouse=True)
def _process(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch, one_rank(folder, tiny_llama):
        patch.setitem(vars(kernels), "warm_up", lambda *_: 0.0)  # there is no GPU to compile for
        yield


@pytest.fixture(scope="module", params=BASES)
def group(request: pytest.FixtureRequest, tiny_llama: Path) -> GpuGroup:
    return GpuGroup(engine_config(tiny_llama, SECTION), request.param)


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def totals(group: GpuGroup) -> dict[tuple[str, ...], float]:
    return dict(read_totals(worker_of(group.config).counters.path.parent).values)


def grown(group: GpuGroup, before: dict[tuple[str, ...], float]) -> dict[str, int]:
    """Layer tokens by reason, "" standing for sparse, since ``before``."""
    return {
        key[2]: int(value - before.get(key, 0))
        for key, value in totals(group).items()
        if key[0] == LAYER_TOKENS and value != before.get(key, 0)
    }


class Marks:
    """Stands in for the kernels of vLLM and of ours, which need a GPU: they add 1 and 100 to every
    row that they are told to compute."""

    def __init__(self, patch: pytest.MonkeyPatch, group: GpuGroup) -> None:
        patch.setattr(triton_attn, "unified_attention", self.base)
        patch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", self.base)
        patch.setitem(vars(kernels), "forward", self.ours)
        for layer in group.layers:
            patch.setattr(layer.impl, "vllm_flash_attn_version", 2, raising=False)
        self.tables: list[torch.Tensor] = []

    def base(self, *, out: torch.Tensor, cu_seqlens_q: torch.Tensor, **_: Any) -> None:
        out[cu_seqlens_q[0] : cu_seqlens_q[-1]] += 1

    def ours(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        work: Any,
        table: Any,
        scale: float,
        out: torch.Tensor,
        kept: Any = None,
    ) -> torch.Tensor:
        for _, _, first, end, row, *_ in work.blocks.tolist():
            out[row : row + end - first] += 100
        self.tables.append(block_table)
        return torch.arange(len(table.rows))


def marked(group: GpuGroup, common: Any, layer: int = 0, metadata: Any = None) -> list[float]:
    """What `Marks` left of each row."""
    q = torch.zeros(common.num_actual_tokens, group.heads, group.head_dim, dtype=group.dtype)
    cache = torch.zeros(1, group.kv_heads, PAGE, 2 * group.head_dim, dtype=group.dtype)
    out = torch.zeros_like(q)
    group.forward(metadata or group.builder.build(0, common), q, cache, out, layer)
    assert (out == out[:, :1, :1]).all()
    return list(out[:, 0, 0].tolist())


# What is planned


def is_sparse(request: Request) -> bool:
    """What the documentation says of a request."""
    return request.prefilling and request.rows >= MIN_QUERY and request.context >= MIN_PROMPT


REQUESTS = st.lists(
    st.one_of(
        st.builds(Request, st.just(1), st.sampled_from([2, 511, 512, 3000]), st.just(False)),
        st.builds(
            lambda rows, before: Request(rows, rows + before, True),
            st.sampled_from([1, 2, 63, 64, 65, 300, 512]),
            st.sampled_from([0, 1, 448, 511, 512, 2000]),
        ),
    ),
    min_size=1,
    max_size=9,
)


@budget(max_examples=60, deadline=None, derandomize=True)
@given(
    REQUESTS,
    st.sampled_from([v1_order, v2_order, list]),
    st.sampled_from([(0, 0), (0, 7), (3, 3)]),
    st.booleans(),
)
def test_every_row_has_one_place_with_the_metadata_of_its_run_alone(
    group: GpuGroup, requests: list[Request], order: Any, padding: tuple[int, int], tells: bool
) -> None:
    ordered = order(requests)
    assert sorted(map(repr, ordered)) == sorted(map(repr, requests))
    common = common_of(ordered, padding=padding, tells_padding=tells)
    metadata = group.builder.build(0, common)
    assert_same(metadata, group.base_builder.build(0, common))
    wanted = [r for r, it in enumerate(ordered) if is_sparse(it)]
    if not wanted:
        assert type(metadata) is type(group.base_builder.build(0, common))
        return
    assert isinstance(metadata, MixedMetadata)
    assert metadata.plan.core == wanted
    lengths = [pair for _, work in metadata.works for pair in work.lengths]
    assert lengths == [(ordered[r].rows, ordered[r].context) for r in wanted]

    starts = common.query_start_loc.tolist()
    places = np.zeros(sum(it.rows for it in ordered), dtype=int)
    blocks = [block for _, work in metadata.works for block in work.blocks.tolist()]
    for _, _, first, end, row, *_ in blocks:
        places[row : row + end - first] += 1
    for rows, own in metadata.parts:
        places[rows] += 1
        first, last = starts.index(rows.start), len(starts) - 1 - starts[::-1].index(rows.stop)
        # The runner's words about a batch in which there is nobody else.
        alone = common_of(ordered[first:last], padding=(max(0, last - len(ordered)), 0))
        alone.block_table_tensor = common.block_table_tensor[first:last]
        alone.slot_mapping = common.slot_mapping[rows]
        assert_same(own, group.base_builder.build(0, alone, fast_build=True))
    assert (places == 1).all()


def test_the_order_that_model_runner_v1_is_asked_for(tiny_llama: Path, base: str) -> None:
    assert GpuGroup(engine_config(tiny_llama, SECTION), base).builder.reorder_batch_threshold == 1
    # Where nothing can be sparse, nothing is asked for.
    off = engine_config(tiny_llama, {**SECTION, "enabled": False})
    dense = GpuGroup(off, base)
    assert dense.builder.reorder_batch_threshold == dense.base_builder.reorder_batch_threshold


def test_without_the_context_on_the_host_nothing_is_planned(group: GpuGroup) -> None:
    before = totals(group)
    common = common_of(MIXED).replace(seq_lens_cpu_upper_bound=None)
    assert not isinstance(group.builder.build(0, common), MixedMetadata)
    assert grown(group, before) == {"other_attention": sum(it.rows for it in MIXED)}


def test_what_model_runners_may_hand_on_is_not_handed_on(group: GpuGroup) -> None:
    """V1 gives a group another one's metadata with the block table changed, if it may."""
    assert not group.builder.supports_update_block_table


# What is captured, and what is drafted


@pytest.mark.parametrize("name", ["build_for_cudagraph_capture", "build_for_drafting"])
def test_neither_a_captured_batch_nor_a_draft_has_a_plan(group: GpuGroup, name: str) -> None:
    common = common_of(MIXED)
    before = totals(group)
    more = (0,) if name == "build_for_drafting" else ()
    metadata = getattr(group.builder, name)(common, *more)
    assert type(metadata) is type(getattr(group.base_builder, name)(common, *more))
    assert totals(group) == before
    assert isinstance(group.builder.build(0, common_of(MIXED)), MixedMetadata)  # and then again


@pytest.mark.parametrize("support", list(AttentionCGSupport))
def test_full_graphs_are_for_decode_alone(
    group: GpuGroup, monkeypatch: pytest.MonkeyPatch, support: AttentionCGSupport
) -> None:
    builder = type(group.builder)
    monkeypatch.setattr(base_of(builder), "_cudagraph_support", support)
    said = builder.get_cudagraph_support(group.config, group.spec)
    assert said.value == min(support.value, AttentionCGSupport.UNIFORM_BATCH.value)
    assert builder.get_varlen_cudagraph_max_query_len(group.config, group.spec) is None


def test_a_batch_that_fits_a_decode_graph_has_no_plan(tiny_llama: Path, base: str) -> None:
    """As many rows each as verification has, whatever the configuration or the runner says."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    section = {**SECTION, "min_query_tokens": 1, "min_prompt_tokens": 1}
    config = engine_config(tiny_llama, section, speculative_config=speculation)
    group = GpuGroup(config, base)
    assert group.builder.reorder_batch_threshold == 4
    for told in (True, False):
        uniform = common_of([Request(4, 900, told)] * 3)
        assert not isinstance(group.builder.build(0, uniform), MixedMetadata)
    more = group.builder.build(0, common_of([Request(4, 900, True), Request(5, 900, True)]))
    assert more.plan.core == [1]


def test_draft_layers_are_dense(tiny_llama: Path, base: str) -> None:
    config = engine_config(tiny_llama, SECTION)
    with set_model_tag("eagle_head"):
        group = GpuGroup(config, base)
    before = totals(group)
    metadata = group.builder.build(0, common_of(MIXED))
    assert type(metadata) is type(group.base_builder.build(0, common_of(MIXED)))
    assert grown(group, before) == {"draft": sum(it.rows for it in MIXED)}
    # Speculators may refresh it within a graph, as the base's.
    for name in ("supports_draft_decode_metadata_update", "supports_update_block_table"):
        assert getattr(group.builder, name) in (False, getattr(group.base_builder, name))
    if group.builder.supports_draft_decode_metadata_update:
        group.builder.update_draft_decode_metadata(metadata)


def test_schedules_of_parts_do_not_meet_in_one_buffer(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLASH_ATTN 3 under full graphs keeps a step's schedule in a buffer of the builder."""
    group = GpuGroup(engine_config(tiny_llama, SECTION), "flash")
    builder = group.builder
    monkeypatch.setattr(
        flash_attn,
        "get_scheduler_metadata",
        lambda *, batch_size, **_: torch.full((batch_size,), batch_size, dtype=torch.int32),
        raising=False,
    )
    builder.aot_schedule = builder.use_full_cuda_graph = True
    builder.scheduler_metadata = torch.zeros(64, dtype=torch.int32)
    metadata = builder.build(0, common_of(MIXED))
    assert len(metadata.parts) > 1
    assert metadata.scheduler_metadata.tolist() == [len(MIXED)] * len(MIXED)
    assert all(part.scheduler_metadata is None for _, part in metadata.parts)


# What layers do


@pytest.mark.parametrize("padding", [(0, 0), (2, 5)])
def test_rows_go_where_the_plan_says(
    group: GpuGroup, monkeypatch: pytest.MonkeyPatch, padding: tuple[int, int]
) -> None:
    marks = Marks(monkeypatch, group)
    common = common_of(MIXED, padding=padding)
    before = totals(group)
    wanted = [100 if r in SPARSE else 1 for r, it in enumerate(MIXED) for _ in range(it.rows)]
    assert marked(group, common) == wanted + [0] * padding[1]
    assert marks.tables[0] is common.block_table_tensor
    assert grown(group, before) == {"": 1129, "decode": 3, "short_context": 200, "short_query": 16}

    nothing = common_of([it for r, it in enumerate(MIXED) if r not in SPARSE])
    assert set(marked(group, nothing)) == {1}


def test_a_dense_layer_takes_the_whole_of_a_mixed_step(
    tiny_llama: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[dict[str, Any]] = [{}, {"logits_soft_cap": 30.0}, {}]
    group = GpuGroup(engine_config(tiny_llama, SECTION), base, layers)
    Marks(monkeypatch, group)
    common = common_of(MIXED)
    before = totals(group)
    metadata = group.builder.build(0, common)
    for layer, seen in enumerate(({1, 100}, {1}, {1, 100})):
        assert set(marked(group, common, layer, metadata)) == seen
    tokens = {"": 1129, "decode": 3, "short_context": 200, "short_query": 16}
    assert grown(group, before) == {**{k: 2 * v for k, v in tokens.items()}, "softcap": 1348}


def test_profiling_is_the_base_backends(group: GpuGroup) -> None:
    out = torch.full((3, 4, 64), torch.nan, dtype=group.dtype)
    impl = group.layers[0].impl
    if hasattr(impl, "vllm_flash_attn_version"):
        impl.vllm_flash_attn_version = 2
    assert impl.forward(group.layers[0], out, out, out, torch.empty(0), None, out) is out
    assert (out == 0).all()


def test_tiles_are_counted_in_units_of_16_keys(
    tiny_llama: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {**SECTION, "policy": {"selector": "static", "tile": 64}}
    group = GpuGroup(engine_config(tiny_llama, section), base, [{}, {}])
    Marks(monkeypatch, group)
    before = totals(group)
    common = common_of([Request(600, 600, True)])
    metadata = group.builder.build(0, common)
    for layer in (0, 1):
        marked(group, common, layer, metadata)
    group.builder.build(0, common_of([Request(1, 601, False)]))
    after = totals(group)
    blocks = [-(-min(64 * n, 600) // 64) for n in range(1, 11)]
    assert after[CAUSAL] - before.get(CAUSAL, 0) == 2 * 4 * 4 * sum(blocks)
    assert after[COMPUTED] - before.get(COMPUTED, 0) == 2 * 4 * (0 + 1 + 2 + 3)


def test_who_looks_sees_keys_and_values(group: GpuGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    Marks(monkeypatch, group)
    g = torch.Generator().manual_seed(0)
    common = common_of([Request(1, 9, False), Request(600, 700, True)])
    # Heads beside tokens in memory, as vLLM has it by default.
    cache = torch.randn(100, PAGE, 2, 128, generator=g).to(group.dtype).transpose(1, 2)
    q = torch.randn(601, 4, 64, generator=g).to(group.dtype)
    calls: list[observe.Call] = []
    with observe.observing(calls.append):
        metadata = group.builder.build(0, common)
        group.forward(metadata, q, cache, torch.zeros_like(q))
    (call,) = calls
    assert (call.layer, call.requests) == (0, [1])
    assert torch.equal(call.rows(1), q[1:])
    k, v = call.keys_values(1)
    at = [(int(common.block_table_tensor[1, p // PAGE]), p % PAGE) for p in range(700)]
    want = torch.stack([cache[block, :, token] for block, token in at])
    assert torch.equal(torch.cat((k, v), 2), want)


class Stream:
    """A device's stream as `TileTally` sees it: it has come past an event, or not yet."""

    def __init__(self) -> None:
        self.arrived, self.recorded = True, 0

    def record(self) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return self.arrived


def test_counts_are_read_only_once_they_have_arrived() -> None:
    stream = Stream()
    tables = {"a": PolicyTable([Dense()] * 2), "b": PolicyTable([Static(tile=32)])}
    tally = TileTally(tables, CPU, stream)

    def step(tiles: int) -> None:
        tally.add("a", torch.tensor([tiles, tiles]))
        tally.add("b", torch.tensor([tiles]))  # of 32 keys: two units each

    def taken() -> list[int]:
        tiles = tally.take()
        return [count for layer in ("a", "b") for count in tiles[layer].tolist()] if tiles else []

    assert taken() == [] and stream.recorded == 0
    stream.arrived = False
    step(1)
    assert (stream.recorded, taken()) == (1, [])
    step(10)  # the device is behind: no second copy is started
    assert stream.recorded == 1
    stream.arrived = True
    assert taken() == [1, 1, 2]  # of the first step; the second's copy starts
    assert (stream.recorded, taken(), taken()) == (2, [10, 10, 20], [])
    step(100)
    assert (stream.recorded, taken()) == (3, [100, 100, 200])
    tally.add("b", torch.tensor([1]))
    assert list(tally.take()) == ["b"]


REASONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sliding_window", {"per_layer_sliding_window": 128}, {}),
    ("softcap", {"logits_soft_cap": 20.0}, {}),
    ("alibi", {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, {}),
    ("sinks", {"sinks": torch.zeros(4, dtype=torch.bfloat16)}, {}),
    ("chunked_attention", {"chunk_lookback": 2}, {}),
    ("switched_off", {}, {"enabled": False}),
]


@pytest.mark.parametrize(("reason", "layer", "section"), REASONS, ids=[r[0] for r in REASONS])
def test_a_layer_that_is_dense_says_why(
    tiny_llama: Path, reason: str, layer: dict[str, Any], section: dict[str, Any]
) -> None:
    group = GpuGroup(engine_config(tiny_llama, {**SECTION, **section}), "triton", [layer])
    before = totals(group)
    assert not isinstance(group.builder.build(0, common_of(MIXED)), MixedMetadata)
    assert grown(group, before) == {reason: 1348}


def test_groups_that_are_dense_say_why(tiny_llama: Path, base: str) -> None:
    facts: dict[str, Any] = {"block_size": PAGE, "num_kv_heads": 2, "dtype": torch.bfloat16}
    specs = {
        "non_causal": FullAttentionSpec(**facts, head_size=64, non_causal=True),
        "head_dim": FullAttentionSpec(**facts, head_size=64, head_size_v=32),
        "quantized_kv": FullAttentionSpec(**{**facts, "dtype": torch.uint8}, head_size=64),
    }
    for reason, spec in specs.items():
        group = GpuGroup(engine_config(tiny_llama, SECTION), base, spec=spec)
        before = totals(group)
        group.builder.build(0, common_of(MIXED))
        assert grown(group, before) == {reason: 1348}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"causal": False}, "non_causal"),
        ({"causal": torch.ones(8, dtype=torch.int32)}, "non_causal"),
        ({"mm_req_doc_ranges": {3: [(5, 40)]}}, "multimodal_prefix"),
    ],
)
def test_a_step_that_is_dense_says_why(
    group: GpuGroup, change: dict[str, Any], reason: str
) -> None:
    before = totals(group)
    common = common_of(MIXED).replace(**change)
    assert not isinstance(group.builder.build(0, common), MixedMetadata)
    assert grown(group, before) == {reason: 1348}


def test_builders_that_vllm_derives_stay_dense(tiny_llama: Path, base: str) -> None:
    from vllm.model_executor.layers.attention.encoder_only_attention import (
        create_encoder_only_attention_backend,
    )

    group = GpuGroup(engine_config(tiny_llama, SECTION), base)
    derived = create_encoder_only_attention_backend(group.backend).get_builder_cls()
    builder = derived(group.spec, group.names, group.config, CPU)
    before = totals(group)
    assert not isinstance(builder.build(0, common_of(MIXED)), MixedMetadata)
    assert grown(group, before) == {"other_attention": 1348}


def test_kernels_that_do_not_compile_end_the_start(
    tiny_llama: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(vars(kernels), "warm_up", fail)
    with pytest.raises(SparsePrefillError, match=r"RuntimeError: out of resource: shared memory"):
        GpuGroup(engine_config(tiny_llama, SECTION), base)


def test_layers_whose_output_is_quantized_are_not_taken(group: GpuGroup) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    impl, name = group.layers[0].impl, NAME.format(0)
    assert not impl.fused_output_quant_supported(kFp8StaticTensorSym), name


def test_another_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms

    from vllm_sparse_backend import backend

    monkeypatch.setattr(platforms, "_current_platform", platforms.interface.UnspecifiedPlatform())
    with pytest.raises(SparsePrefillError, match="platform: want cpu, cuda or rocm, got"):
        _ = backend.SparsePrefillBackend
