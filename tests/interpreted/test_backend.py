"""The GPU backend with its own kernels, from vLLM's metadata to the counters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _batch import engine_config
from _gpu_batch import PAGE, GpuGroup, Request, Told, common_of
from _parallel import write_profile
from vllm.config import set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.v1.attention.backends import triton_attn

from vllm_sparse_backend import compat, compat_requests
from vllm_sparse_backend.backend.worker import worker_of
from vllm_sparse_backend.metrics import read_totals
from vllm_sparse_backend.metrics.counters import CAUSAL, COMPUTED
from vllm_sparse_backend.ops import layout, paged_sparse_attention, reference
from vllm_sparse_backend.selection import parse_policy
from vllm_sparse_backend.selection.vertical_slash import VerticalSlash
from vllm_sparse_backend.selection.view import View

BATCH = [
    Request(1, 40, False),
    Request(70, 300, True),
    Request(3, 90, True),
    Request(64, 256, True),
]
SPARSE = [1, 3]
WINDOW: dict[str, Any] = {"sink": 16, "local": 64}
POLICY = {"selector": "mass", "tau": 0.2, **WINDOW}
STRIDED = {"selector": "strided", "stride": 3, "tile": 64, **WINDOW}
SLASH = {"selector": "vertical_slash", "columns": 30, "diagonals": 100, **WINDOW}


@pytest.fixture(autouse=True)
def _parallel(tmp_path: Path, tiny_llama: Path) -> Iterator[None]:
    with set_current_vllm_config(engine_config(tiny_llama)):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'meeting'}", 0, "gloo")
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("listed", [False, True])
def test_a_mixed_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    section: dict[str, Any] = {"min_prompt_tokens": 256, "policy": POLICY}
    heads: Any = POLICY
    if listed:
        heads = [POLICY, STRIDED, {"selector": "dense"}, SLASH]
        profile = write_profile(tmp_path / "p.json", [heads, heads])
        section = {"min_prompt_tokens": 256, "profile": str(profile)}
    group = GpuGroup(engine_config(tiny_llama, section, dtype="float16"), "triton")
    taken: list[int] = []

    def totals() -> dict[Any, float]:
        return dict(read_totals(worker_of(group.config).counters.path.parent).values)

    before = totals()

    def dense(*, out: torch.Tensor, cu_seqlens_q: torch.Tensor, **_: Any) -> None:
        taken.extend(cu_seqlens_q.diff().tolist())

    monkeypatch.setattr(triton_attn, "unified_attention", dense)
    g = torch.Generator().manual_seed(0)
    common = common_of(BATCH, padding=(1, 3))
    # Heads beside tokens in memory, as vLLM has it by default.
    cache = torch.randn(100, PAGE, 2, 128, generator=g).half().transpose(1, 2)
    q = torch.randn(common.num_actual_tokens, 4, 64, generator=g).half()
    out = torch.full_like(q, torch.nan)
    group.forward(group.builder.build(0, common), q, cache, out)
    group.builder.build(0, common_of(BATCH[:1]))  # reads what was counted

    want, stats = paged_sparse_attention(
        q,
        cache,
        common.block_table_tensor,
        common.query_start_loc,
        common.seq_lens,
        heads,
        requests=SPARSE,
        kv_layout="strided",
        impl="reference",
    )
    sparse = torch.zeros(len(q), dtype=torch.bool)
    starts = common.query_start_loc.tolist()
    for request in SPARSE:
        sparse[starts[request] : starts[request + 1]] = True
    torch.testing.assert_close(out[sparse], want[sparse], rtol=0.01, atol=0.01)
    assert out[~sparse].isnan().all()
    assert taken == [1, 3]
    now = totals()
    for key, tiles in ((COMPUTED, stats.tiles_computed), (CAUSAL, stats.tiles_causal)):
        units = [
            n * size for n, size in zip(tiles, (1, 4, 1, 1) if listed else [1] * 4, strict=True)
        ]
        assert now[key] - before.get(key, 0) == sum(units)
    assert sum(stats.tiles_computed) < sum(stats.tiles_causal)


def test_a_prompt_in_chunks_whose_codes_are_kept(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "supported_platform", lambda: "cuda")
    section = {"min_prompt_tokens": 100, "policy": POLICY, "kept_prompts": 1}
    group = GpuGroup(engine_config(tiny_llama, section, dtype="float16"), "triton")
    g = torch.Generator().manual_seed(1)
    cache = torch.randn(100, PAGE, 2, 128, generator=g).half().transpose(1, 2)
    for rows, context, mean_of in ((300, 300, 256), (100, 400, 256), (150, 550, 512)):
        common = common_of([Request(rows, context, True)])
        with compat_requests._telling(Told([5], [550])):
            metadata = group.builder.build(0, common)
        ((_, work),) = metadata.works
        assert work.kept and len(work.means) == (context != 400)
        q = torch.randn(rows, 4, 64, generator=g).half()
        out = torch.full_like(q, torch.nan)
        group.forward(metadata, q, cache, out)

        k, v = layout.unpack(cache, common.block_table_tensor[0], context, "strided")
        policies = [parse_policy(POLICY)] * 4
        tiles = reference.select(q, k, policies, 0.125, 550, mean_of)
        wanted = reference.attend(q, k, v, tiles, 0.125)
        torch.testing.assert_close(out, wanted, rtol=0.01, atol=0.01)


def test_list_selectors_take_their_memory_while_vllm_measures(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int | None]] = []
    keep = VerticalSlash.keep

    def saved(self: VerticalSlash, view: View) -> torch.Tensor:
        asked.append((view.q.shape[1], view.seq_len, view.layer))
        return keep(self, view)

    monkeypatch.setattr(VerticalSlash, "keep", saved)
    section = {"min_prompt_tokens": 256, "policy": SLASH}
    config = engine_config(tiny_llama, section, dtype="float16", max_model_len=2048)
    group = GpuGroup(config, "triton", [{}, {"per_layer_sliding_window": 64}])
    assert {rows for rows, _, _ in asked} == {100, 64}  # a rehearsal, and the kernels' warming up
    asked.clear()
    cache = torch.zeros(1, 2, PAGE, 128).half()
    for rows in (300, 200, 4000):
        q = torch.zeros(rows, 4, 64).half()
        for index in (0, 1):
            group.forward(None, q, cache, torch.zeros_like(q), index)
    assert asked == [(300, 2048, 0), (2048, 2048, 0)]
