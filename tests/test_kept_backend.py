"""What of prompts in progress the GPU backend keeps: for whom, how much, and given back by whom."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _batch import engine_config, one_rank
from _gpu_batch import GpuGroup, Request, Told, common_of
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from tools.gpu_check.stub import stub_driver
from vllm_sparse_backend import compat, compat_requests
from vllm_sparse_backend.backend import start
from vllm_sparse_backend.errors import ConfigError
from vllm_sparse_backend.ops import triton as kernels

SECTION = {"min_prompt_tokens": 512, "kept_prompts": 2}


@pytest.fixture(scope="module", autouse=True)
def _process(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("parallel")
    patches = pytest.MonkeyPatch.context()
    with patches as patch, one_rank(folder, tiny_llama), stub_driver("sm_90"):
        patch.setitem(vars(kernels), "warm_up", lambda *_: 0.0)  # there is no GPU to compile for
        yield


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "supported_platform", lambda: "cuda")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog


def works(group: GpuGroup, requests: dict[int, tuple[int, int, int]]) -> list[Any]:
    """A step's work of requests, as rows, context and length of the prompt by name."""
    common = common_of([Request(rows, context, True) for rows, context, _ in requests.values()])
    told = Told(list(requests), [prompt for *_, prompt in requests.values()])
    with compat_requests._telling(told):
        return [work for _, work in group.builder.build(0, common).works]


def test_chunks_of_a_prompt_are_made_codes_once(tiny_llama: Path) -> None:
    group = GpuGroup(engine_config(tiny_llama, SECTION), "triton", [{}, {}])
    (first,) = works(group, {11: (600, 600, 1500)})
    assert first.kept and first.chunks[:, 1].tolist() == list(range(0, 1024, 128))
    assert first.means.tolist() == [[0, 4, 512, 0]]
    # A neighbour whose prompt is whole is none of those that are kept.
    second, alone = works(group, {11: (300, 900, 1500), 12: (700, 700, 700)})
    assert second.kept and second.chunks[:, 1].tolist() == list(range(512, 1024, 128))
    assert len(second.means) == len(second.summed) == 0
    assert not alone.kept and len(alone.chunks) == 8
    assert [(work.lengths, work.prompts.tolist()) for work in (second, alone)] == [
        (((300, 900),), [1500]),
        (((700, 700),), [700]),
    ]
    (third,) = works(group, {11: (600, 1500, 1500)})
    assert third.kept and third.means[:, 2].tolist() == [1024]


def test_where_nobody_tells_of_requests_nothing_is_kept(tiny_llama: Path) -> None:
    group = GpuGroup(engine_config(tiny_llama, SECTION), "triton")
    (work,) = (
        work for _, work in group.builder.build(0, common_of([Request(600, 600, True)])).works
    )
    assert not work.kept


def test_memory_is_held_from_the_profile_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = engine_config(tiny_llama, SECTION)
    with monkeypatch.context() as patch:  # as it is before there is a builder
        patch.setattr("_gpu_batch.base_of", lambda _: lambda *_: None)
        backend = "vllm_sparse_backend.backend.cuda_triton.SparsePrefillTritonMetadataBuilder"
        patch.setattr(f"{backend}.__init__", lambda *_: None)
        group = GpuGroup(config, "triton", [{}, {"per_layer_sliding_window": 64}])
    plain, sliding = (layer.impl for layer in group.layers)
    q = torch.zeros(10, group.heads, group.head_dim, dtype=group.dtype)
    cache = torch.zeros(0, dtype=group.dtype)
    for layer in group.layers:
        layer.impl.forward(layer, q, q, q, cache, None, torch.zeros_like(q))
    most = config.model_config.max_model_len
    said = kernels.kept_bytes(2, most, group.kv_heads, group.head_dim)
    assert plain._reserved.nbytes == said
    assert sliding._reserved is None
    with caplog.at_level(logging.INFO, "vllm.sparse_prefill"):
        builder = group.backend.get_builder_cls()(group.spec, group.names, config, q.device)
    assert plain._reserved is None
    kept = plain._kept.by_bits
    assert sum(x.nbytes for codes in kept.values() for x in codes) == said * len(kept)
    assert f"2 prompts kept from chunk to chunk, {said / 2**30:.2f} GiB" in caplog.text
    for layer in group.layers:  # a dummy step later on
        layer.impl.forward(layer, q, q, q, cache, None, torch.zeros_like(q))
        assert layer.impl._reserved is None
    assert builder._shelf is not None


def test_microbatches_keep_nothing(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = engine_config(tiny_llama, SECTION)
    config.parallel_config.ubatch_size = 2
    with caplog.at_level(logging.WARNING, "vllm.sparse_prefill"):
        group = GpuGroup(config, "triton")
    assert group.builder._shelf is None and group.layers[0].impl._kept is None
    assert "kept_prompts: nothing is kept, since batches are cut into microbatches" in caplog.text


def test_it_is_for_gpus(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "supported_platform", lambda: "cpu")
    with pytest.raises(ConfigError, match=r"kept_prompts: want it on a GPU only, got it on .* cpu"):
        start.resolve(engine_config(tiny_llama, SECTION))


def test_model_runner_v1_gives_each_request_a_number(tiny_llama: Path) -> None:
    def state(name: str) -> CachedRequestState:
        return CachedRequestState(
            req_id=name, prompt_token_ids=[1], mm_features=[], sampling_params=SamplingParams(),
            generator=None, block_ids=([],), num_computed_tokens=0, output_token_ids=[],
        )  # fmt: skip

    runner = SimpleNamespace(
        requests={name: state(name) for name in "ab"},
        input_batch=SimpleNamespace(req_ids=["b", "a"]),
    )
    told = compat_requests._OfV1(runner)
    one, other = told.identities(2)
    assert one != other and told.identities(2) == [one, other]
    runner.input_batch.req_ids.reverse()
    assert told.identities(1) == [other]
    runner.requests["a"] = state("a")  # the name comes again
    assert told.identities(1)[0] not in (one, other)
