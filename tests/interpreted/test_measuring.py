"""What looks into layers (calibration, `inspect`, what `compare` reads), behind the GPU backend.

In an engine's place stand layers of the GPU backend with vLLM's own builder and metadata, which
read a prompt in chunks from a paged cache; the kernels are interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _batch import engine_config
from _gpu_batch import PAGE, GpuGroup, Request, Told, common_of
from vllm.config import set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.v1.attention.backends import triton_attn

from vllm_sparse_backend import compat, compat_requests
from vllm_sparse_backend.backend.observe import Call, observing
from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.measure import BY_LADDER, LayerRecord, of_step
from vllm_sparse_backend.calibrate.record import Recorder
from vllm_sparse_backend.calibrate.rules import Rule
from vllm_sparse_backend.calibrate.run import Model, Wanted, _read, _starts
from vllm_sparse_backend.calibrate.table import Group
from vllm_sparse_backend.compare.capture import _Writer
from vllm_sparse_backend.compare.store import Store
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.ops import layout, reference
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.report import capture
from vllm_sparse_backend.report.attention import AttentionMap
from vllm_sparse_backend.selection import DENSE, Mass
from vllm_sparse_backend.target import Gpu

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)
SCALE = 0.125


@pytest.fixture(autouse=True)
def _on_a_gpu(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with set_current_vllm_config(engine_config(tiny_llama)):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'meeting'}", 0, "gloo")
        initialize_model_parallel()
    monkeypatch.setattr(compat, "supported_platform", lambda: "cuda")
    # The base backend's: of steps that are too short.
    monkeypatch.setattr(triton_attn, "unified_attention", lambda **_: None)
    yield
    cleanup_dist_env_and_memory()


class Reading:
    """Two layers that read one prompt of ``tokens`` in chunks; generates nothing."""

    def __init__(self, model: Path, section: dict[str, Any], tokens: int, chunk: int) -> None:
        section = {"policy": DENSE.model_dump(), **section}
        self.group = GpuGroup(
            engine_config(model, section, dtype="float16"), "triton", layers=({}, {})
        )
        self.tokens, self.chunk = tokens, chunk
        g = torch.Generator().manual_seed(3)
        pages = -(-tokens // PAGE)
        self.table = torch.randperm(pages + 5, generator=g)[:pages].int()[None]
        # Heads beside tokens in memory, as vLLM has it by default.
        self.caches = [
            torch.randn(pages + 5, PAGE, 2, 128, generator=g).half().transpose(1, 2)
            for _ in range(2)
        ]
        self.q = [torch.randn(tokens, 4, 64, generator=g).half() for _ in range(2)]
        self.out = [torch.full_like(q, torch.nan) for q in self.q]

    def generate(self, prompt: Any, *_: Any, **__: Any) -> None:
        """As `vllm.LLM`'s."""
        prompt = prompt[0] if isinstance(prompt, list) else prompt
        assert len(prompt["prompt_token_ids"]) == self.tokens
        for begin in range(0, self.tokens, self.chunk):
            end = min(begin + self.chunk, self.tokens)
            common = common_of([Request(end - begin, end, True)])
            common = common.replace(block_table_tensor=self.table)
            with compat_requests._telling(Told([5], [self.tokens])):
                metadata = self.group.builder.build(0, common)
            for layer in range(2):
                q, out = self.q[layer][begin:end], self.out[layer][begin:end]
                self.group.forward(metadata, q, self.caches[layer], out, layer)

    def keys_values(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain ones."""
        return layout.unpack(self.caches[layer], self.table[0], tokens, "strided")

    def steps(self) -> list[tuple[int, int]]:
        """Where chunks begin and end."""
        begins = range(0, self.tokens, self.chunk)
        return [(begin, min(begin + self.chunk, self.tokens)) for begin in begins]


def wanted(chunk: int, blocks: int = 12) -> Wanted:
    options = EngineOptions(model="m", max_model_len=4096, chunk_tokens=chunk, dtype="float16")
    return Wanted(
        options, "m", ("text",), (4096,), Rule.HEAD, 0.02, np.inf, blocks, 0, Path("p.json"),
        Gpu("sm_90", 2),
    )  # fmt: skip


def assert_same(made: Any, direct: Sequence[Any]) -> None:
    """A part, and the sums of its layers."""
    assert list(made.octaves) == direct[0].octaves
    for name in ("size", *BY_LADDER):
        its = getattr(made, name)
        for layer, sums in enumerate(direct):
            other = getattr(sums, name)
            if name == "size":
                np.testing.assert_array_equal(its[layer], other)
            else:
                for ladder, values in enumerate(other):
                    np.testing.assert_array_equal(its[ladder][layer], values)
    np.testing.assert_array_equal(made.rows, direct[0].rows)
    np.testing.assert_array_equal(made.causal, direct[0].causal)


def test_calibration_measures_what_the_cpus_does(tiny_llama: Path) -> None:
    tokens, chunk = 2304, 1024  # the last step starts amid a page and amid nothing else
    reading = Reading(tiny_llama, {}, tokens, chunk)
    document = Document(Group("text", tokens), 0, tuple(range(tokens)))
    asked, steps = wanted(chunk), []
    made = _read(reading, asked, Model(FACTS, (0, 1)), document, lambda: steps.append(1))
    # Of the first chunk nothing is sparse, from 2,048 tokens of context on everything.
    assert len(steps) == 2 * 2 and made.steps == 2
    starts = _starts(asked, document)
    direct, cpu = (
        [],
        Recorder(document.group, SparseConfig(), starts, tokens, lambda: None, asked.ladders),
    )
    for layer in range(2):
        record = LayerRecord(4, layer=layer)
        for begin, end in reading.steps()[1:]:
            q, (k, v) = reading.q[layer][begin:end], reading.keys_values(layer, end)
            record.add(q, k, v, SCALE, of_step(starts, end - begin, end), tokens)
            # What the CPU's backend shows of the same step: another cache and layout.
            cache = layout.pack(k, v, "vec")
            table = torch.arange(len(cache), dtype=torch.int32)[None]
            at, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, end - begin], [end]))
            cpu(Call(layer, [0], q, cache, table, at, ends, SCALE, "vec"))
        direct.append(record.sums())
    assert_same(made, direct)
    assert_same(cpu.part(), direct)
    # And the engine went on with every tile kept.
    begin, end = reading.steps()[-1]
    k, v = reading.keys_values(1, end)
    q = reading.q[1][begin:end]
    tiles = reference.select(q, k, [DENSE] * 4, SCALE)
    exact = reference.attend(q, k, v, tiles, SCALE)
    torch.testing.assert_close(reading.out[1][begin:end], exact, rtol=0.01, atol=0.01)


def test_inspect_draws_what_the_cpus_core_keeps(tiny_llama: Path) -> None:
    tokens, chunk, layer, head = 500, 200, 1, 2
    every = {"min_prompt_tokens": 1, "min_query_tokens": 1}
    reading = Reading(tiny_llama, every, tokens, chunk)
    policy = Mass(tau=0.3, sink=16, local=64)
    profile = Profile.build(FACTS, {layer: {head: policy}}, name="p", defaults=DENSE)
    found = capture._observe(reading, list(range(tokens)), profile, layer, head, "text")
    core = AttentionMap("p", layer, head, policy, "text", tokens, 2048, 4)
    for begin, end in reading.steps():
        q, (k, v) = reading.q[layer][begin:end, head], reading.keys_values(layer, end)
        core.add(q, k[:, 1], v[:, 1], SCALE)
    # A tile whose sum is at the threshold may fall either way; everything else is the same.
    assert 0.2 < found.summary().density < 0.9
    assert float((found.kept != core.kept).float().mean()) < 0.003
    torch.testing.assert_close(found.mass, core.mass)
    assert found.summary().followed_from == 2048, "servers on GPUs have no cost model"


def test_compare_reads_whole_layers(tiny_llama: Path, tmp_path: Path) -> None:
    every = {"min_prompt_tokens": 1, "min_query_tokens": 1}
    reading = Reading(tiny_llama, every, 500, 200)
    store = Store(tmp_path / "parts")
    names = {0: ("text-500-0", "key 0"), 1: ("text-500-1", "key 1")}
    writer = _Writer(store, names, 500, lambda: None)
    with observing(writer):
        reading.generate({"prompt_token_ids": list(range(500))})
    assert writer.closed == [0, 1]
    for layer, (name, key) in names.items():
        its, ends = store.layer(name, key)
        assert ends == [200, 400, 500] and its.scale == SCALE
        k, v = reading.keys_values(layer, 500)
        for made, given in ((its.q, reading.q[layer]), (its.k, k), (its.v, v)):
            torch.testing.assert_close(made, given, rtol=0, atol=0)


def test_a_step_of_one_row_is_nobodys(tiny_llama: Path) -> None:
    every = {"min_prompt_tokens": 1, "min_query_tokens": 1}
    reading = Reading(tiny_llama, every, 401, 200)
    rows: list[int] = []
    with observing(lambda call: rows.append(len(call.rows()))):
        reading.generate({"prompt_token_ids": list(range(401))})
    assert rows == [200, 200] * 2, "which is why `offline.refuse_lone_row` refuses it"
