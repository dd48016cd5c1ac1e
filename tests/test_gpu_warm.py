"""What a GPU's server does at its start is enough for its steps: what it compiles, and the memory
it sets aside."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from _batch import engine_config, one_rank
from _gpu_asked import Layer, said, served, taken, warmed
from _gpu_batch import GpuGroup
from _parallel import write_profile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tools.gpu_check.pool import executor
from tools.gpu_check.stub import stub_driver
from vllm_sparse_backend import compat
from vllm_sparse_backend.control import LEAST_SCALE, MOST_SCALE
from vllm_sparse_backend.ops import PolicyTable
from vllm_sparse_backend.ops import triton as kernels
from vllm_sparse_backend.selection import Sale

SMALL, LARGE = 1 << 30, 5 << 30  # bytes of a cache
FEW, MANY = (1, 4096), (8, 1 << 22)  # prompts and their tokens, whose codes take 2 GiB and more
LAYERS: list[list[dict[str, Any]]] = [
    [
        {"selector": "sale"},
        {"selector": "mass", "tile": 64, "bits": 8},
        {"selector": "static"},
        {"selector": "sale", "bits": "fp4"},
    ],
    [{"selector": "dense"}, {"selector": "strided", "stride": 3}] * 2,
]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process whose kernels are not interpreted."""
    with executor(1) as made:
        yield made


@pytest.fixture(scope="module")
def asked_at_start() -> list[Any]:
    """The arguments of `warm_up`."""
    return []


@pytest.fixture(scope="module")
def group(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, asked_at_start: list[Any]
) -> Iterator[GpuGroup]:
    """A server's two layers on a GPU, with codes kept."""
    folder = tmp_path_factory.mktemp("parallel")

    def kept_in_mind(*args: Any) -> float:
        asked_at_start[:] = args
        return 0.0

    with pytest.MonkeyPatch.context() as patch, one_rank(folder, tiny_llama):
        patch.setitem(vars(kernels), "warm_up", kept_in_mind)
        patch.setattr(compat, "supported_platform", lambda: "cuda")
        profile = str(write_profile(folder / "p.json", LAYERS))
        section = {"profile": profile, "kept_prompts": 1, "min_prompt_tokens": 512}
        with stub_driver("sm_90"):
            yield GpuGroup(engine_config(tiny_llama, section, max_num_seqs=9), "triton", [{}, {}])


def _plain(table: PolicyTable) -> PolicyTable:
    """Without what was made of it on a device."""
    return PolicyTable(table.rows, table.dense_below, table.place)


@pytest.mark.parametrize("arch", ["gfx942", "sm_90"])
@pytest.mark.parametrize("kept", [None, FEW, MANY])
def test_no_step_waits_for_the_compiler(
    group: GpuGroup,
    asked_at_start: list[Any],
    pool: ProcessPoolExecutor,
    arch: str,
    kept: tuple[int, int] | None,
) -> None:
    *shape, tables, _ = asked_at_start
    layer = Layer(*shape)
    impls = [its.impl for its in group.layers]
    assert [codes for _, codes in tables] == [impl.kept for impl in impls]
    assert all(impl.kept is not None for impl in impls)
    at_start = [_plain(table) for table, _ in tables]
    compiled = pool.submit(warmed, arch, layer, at_start, kept).result()
    scaled = [
        _plain(impl._tables(scale)) for impl in impls for scale in (1.0, LEAST_SCALE, MOST_SCALE)
    ]
    by_size = {}
    for size in (SMALL, LARGE):
        its = layer, scaled, kept, size
        by_size[size] = pool.submit(served, arch, *its).result()
        assert by_size[size] <= compiled
        assert pool.submit(served, arch, *its, False).result() <= compiled
    differ = {kernel for kernel, _ in by_size[SMALL] ^ by_size[LARGE]}
    paged = {"sum_keys", "code_keys", "anchor_rows", "attend_tiles"}
    assert differ == (paged if arch == "gfx942" else set())


@pytest.mark.parametrize("arch", ["gfx942", "sm_90"])
def test_one_head_has_no_stride(pool: ProcessPoolExecutor, arch: str) -> None:
    layer, tables = Layer(4, 1, 64), [PolicyTable([Sale()] * 4)]
    compiled = pool.submit(warmed, arch, layer, tables, None).result()
    for size in (SMALL, LARGE):
        assert pool.submit(served, arch, layer, tables, None, size).result() <= compiled


def test_every_policy_is_compiled_for(pool: ProcessPoolExecutor) -> None:
    """That the comparison above can fail."""
    layer = Layer(4, 2, 64)
    other = [PolicyTable([Sale()] * 4), PolicyTable([Sale(bits="fp4")] * 4)]
    compiled = pool.submit(warmed, "sm_100", layer, other[:1], None).result()
    assert not pool.submit(served, "sm_100", layer, other, None, SMALL).result() <= compiled


REQUEST = st.tuples(st.integers(64, 200), st.integers(0, 1500))  # rows, tokens before them


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("heads", [(4, 1), (10, 2), (3, 3)])
def test_the_memory_that_is_set_aside_is_enough(
    pool: ProcessPoolExecutor, arch: str, heads: tuple[int, int]
) -> None:
    layer = Layer(*heads, 64)
    table = PolicyTable([Sale(tail=10**6)] * heads[0])

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(st.lists(REQUEST, min_size=1, max_size=16), st.sampled_from([600, 2000, 5000]))
    @example([(66, 447)] * 9, 5000)  # each begins and ends amid a q block
    @example([(130, 511)] * 2, 2000)
    def check(batch: list[tuple[int, int]], most_keys: int) -> None:
        lengths = [(n, min(n + max(before, 512 - n), most_keys)) for n, before in batch]
        rows = sum(n for n, _ in lengths)
        peak, requests = pool.submit(taken, arch, layer, table, lengths, most_keys).result()
        most = max(1, min(rows // 64, most_keys // 512))
        assert requests <= most
        assert peak <= said(layer, rows, most_keys, most)

    check()


def test_a_step_of_many_short_requests_is_what_is_set_aside(
    group: GpuGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def workspace(*args: int) -> int:
        asked.append(args)
        return 0

    monkeypatch.setitem(vars(kernels), "workspace", workspace)
    layer = group.layers[0]
    most_keys = group.config.model_config.max_model_len
    # By min_query_tokens, 64 here; max_num_seqs; and if there are fewer, min_prompt_tokens.
    for rows, requests in ((63, 1), (200, 3), (8192, min(9, most_keys // 512))):
        q = torch.zeros(rows, group.heads, group.head_dim, dtype=group.dtype)
        layer.impl.forward(layer, q, q, q, q[:0], None, torch.zeros_like(q))
        shape = group.heads, group.kv_heads, group.head_dim
        assert asked.pop() == (rows, most_keys, *shape, requests)
