"""Requests with different settings in one batch, from what model runners know to the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _attention import needs_core
from _batch import Batch, Group, engine_config, one_rank
from _gpu_batch import GpuGroup, Request, common_of
from vllm import SamplingParams

from vllm_sparse_backend import compat_requests, control
from vllm_sparse_backend.backend.worker import SCALES, Worker, worker_of
from vllm_sparse_backend.control import DEFAULT, FIELD, Setting
from vllm_sparse_backend.metrics import read_totals
from vllm_sparse_backend.ops import triton as kernels

pytestmark = needs_core

OFF, LOW, HIGH = Setting(off=True), Setting(threshold_scale=0.5), Setting(threshold_scale=4.0)
TAU = 0.02
# decode, sparse, sparse chunk, short context, sparse, sparse
LENGTHS = [(1, 300), (700, 700), (300, 1100), (200, 200), (640, 1300), (129, 513)]
ASKED = [OFF, DEFAULT, OFF, OFF, HIGH, LOW]


def section(tau: float) -> dict[str, Any]:
    policy = {"selector": "mass", "tau": tau, "sink": 16, "local": 64}
    return {"min_prompt_tokens": 512, "dense_core": False, "policy": policy}


@pytest.fixture(scope="module", autouse=True)
def _parallel(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("parallel"), tiny_llama):
        yield


@dataclass
class Given:
    """A runner's knowledge of a batch."""

    asked: list[Setting]
    lens: list[int]

    def prompt_lens(self, num_reqs: int) -> torch.Tensor:
        return torch.tensor(self.lens, dtype=torch.int32)[:num_reqs]

    def settings(self, num_reqs: int) -> list[Setting]:
        return self.asked[:num_reqs]

    def identities(self, num_reqs: int) -> list[int]:
        return list(range(num_reqs))


def forward(group: Group, batch: Batch, asked: list[Setting]) -> torch.Tensor:
    lens = [context for _, context in batch.lengths]
    with compat_requests._telling(Given(asked, lens)):
        metadata = group.builder.build(0, batch.common)
    return group.forward(batch, metadata=metadata)


def counted(group: Group) -> dict[str, float]:
    totals = read_totals(worker_of(group.config).counters.path.parent)
    return {labels[1] or labels[0]: value for labels, value in totals.of("layer_tokens")}


def test_each_request_of_a_batch_is_computed_as_it_asks(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, section(TAU)))
    batch = group.batch(LENGTHS)
    before = counted(group)
    out = forward(group, batch, ASKED)
    grown = {name: value - before[name] for name, value in counted(group).items()}
    assert {name: value for name, value in grown.items() if value} == {
        "decode": 1,
        "request_off": 300,
        "short_context": 200,
        "sparse": 700 + 640 + 129,
    }
    for request in (0, 2, 3):
        want = group.base(batch, requests=(request, request + 1))
        assert torch.equal(out[batch.rows(request)], want)
    differ = 0
    for request in (1, 4, 5):
        scale = ASKED[request].threshold_scale
        other = Group(engine_config(tiny_llama, section(TAU * scale)))
        alone = forward(other, other.batch([LENGTHS[request]]), [])
        assert torch.equal(out[batch.rows(request)], alone)
        unscaled = forward(group, group.batch([LENGTHS[request]]), [])
        differ += not torch.equal(out[batch.rows(request)], unscaled)
    assert differ == 2


def test_what_others_ask_for_changes_nothing(tiny_llama: Path) -> None:
    group = Group(engine_config(tiny_llama, section(TAU)))
    batch = group.batch(LENGTHS)
    plain = forward(group, batch, [])
    out = forward(group, batch, ASKED)
    rows = batch.rows(1)
    assert torch.equal(out[rows], plain[rows])
    assert torch.equal(forward(group, batch, [DEFAULT] * len(LENGTHS)), plain)


def test_where_all_are_off_the_step_is_the_base_backends(tiny_llama: Path) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    group = Group(engine_config(tiny_llama, {**section(TAU), "dense_core": True}))
    batch = group.batch(LENGTHS)
    with compat_requests._telling(Given([OFF] * len(LENGTHS), [2000] * len(LENGTHS))):
        metadata = group.builder.build(0, batch.common)
    assert type(metadata) is CPUAttentionMetadata
    assert torch.equal(group.forward(batch, metadata=metadata), group.base(batch))


def test_tables_of_many_scales_are_not_kept_for_ever(tiny_llama: Path) -> None:
    worker = worker_of(engine_config(tiny_llama, section(TAU)))
    tables = worker.tables("model.layers.0.self_attn.attn", 4, 64)
    first = tables(3.0)
    assert tables(3.0) is first
    for n in range(SCALES):
        tables(4.0 + n)
    assert tables(3.0) is not first
    assert tables(3.0).rows == first.rows
    assert first.rows[0].model_dump()["tau"] == pytest.approx(3 * TAU)
    assert tables(100.0).rows[0].model_dump()["tau"] == 1.0  # as high as there is


def test_policies_without_a_threshold_are_not_scaled(tiny_llama: Path) -> None:
    for policy in ({"selector": "static"}, {"selector": "dense"}):
        worker: Worker = worker_of(engine_config(tiny_llama, {"policy": policy}))
        tables = worker.tables("model.layers.0.self_attn.attn", 4, 64)
        assert tables(7.0).rows == tables(1.0).rows


@pytest.mark.parametrize("base", ["flash", "triton"])
def test_a_gpu_step_has_work_for_each_scale(
    tiny_llama: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(kernels), "warm_up", lambda *_: 0.0)  # there is no GPU
    group = GpuGroup(engine_config(tiny_llama, section(TAU)), base)
    common = common_of([Request(rows, context, rows > 1) for rows, context in LENGTHS])
    with compat_requests._telling(Given(ASKED, [context for _, context in LENGTHS])):
        metadata = group.builder.build(0, common)
    works = [(scale, list(work.lengths)) for scale, work in metadata.works]
    assert works == [(1.0, [LENGTHS[1]]), (0.5, [LENGTHS[5]]), (4.0, [LENGTHS[4]])]
    # Decode and what is off are one run of the base's where they are neighbours.
    assert [(run.first, run.last) for run in metadata.plan.dense] == [(0, 1), (2, 4)]

    seen: dict[float, list[Any]] = {}

    def kernel(q: Any, kv: Any, pages: Any, work: Any, table: Any, *_: Any, **__: Any) -> Any:
        seen[table.rows[0].tau] = list(work.lengths)
        return torch.zeros(len(table.rows), dtype=torch.int64)

    monkeypatch.setitem(vars(kernels), "forward", kernel)
    impl = group.layers[0].impl
    metadata.parts = []
    q = torch.zeros(common.num_actual_tokens, group.heads, group.head_dim, dtype=group.dtype)
    group.forward(metadata, q, torch.zeros(1), torch.zeros_like(q))
    assert seen == {
        TAU * 0.5: [LENGTHS[5]],
        TAU: [LENGTHS[1]],
        TAU * 4: [LENGTHS[4]],
    }
    assert impl.policies.rows[0].tau == TAU


# What model runners know


def params(setting: Setting) -> SamplingParams:
    """Of a request that has been admitted."""
    return SamplingParams(extra_args=control.admitted({FIELD: setting.text}, setting))


def test_what_was_not_admitted_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    # vLLM's loggers do not propagate.
    import logging

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    compat_requests.logger.addHandler(handler)
    try:
        for _ in range(3):
            wild = SamplingParams(extra_args={FIELD: "off"})
            assert compat_requests._received(wild) == DEFAULT
    finally:
        compat_requests.logger.removeHandler(handler)
    assert len(records) == 1
    assert "past the server's own checks" in records[0] and "not followed" in records[0]
    assert compat_requests._received(None) == DEFAULT
    assert compat_requests._received(SamplingParams()) == DEFAULT
    assert compat_requests._received(params(OFF)) == OFF


class V2:
    """Model runner V2 as far as it adds requests and prepares attention: its own code, over a
    table of requests of its own, without a device."""

    def __init__(self, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.worker.gpu import buffer_utils
        from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState
        from vllm.v1.worker.gpu.states import RequestState

        monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
        # A kernel writes what was staged.
        monkeypatch.setattr(StagedWriteTensor, "apply_write", lambda self: None)
        monkeypatch.setattr(GPUModelRunner, "add_requests", GPUModelRunner.add_requests)
        monkeypatch.setattr(DefaultModelState, "prepare_attn", DefaultModelState.prepare_attn)
        compat_requests._watch_v2()
        self.group = group
        state: Any = DefaultModelState.__new__(DefaultModelState)
        state.rope_state = state.prompt_embeds_state = state.encoder_cache = None
        state.supports_mm_inputs = False
        state.model_config = group.config.model_config
        self.runner: Any = GPUModelRunner.__new__(GPUModelRunner)
        nothing = SimpleNamespace(
            append_block_ids=lambda *_, **__: None,
            add_request=lambda *_: None,
            remove_request=lambda *_: None,
        )
        vars(self.runner).update(
            model_state=state,
            req_states=RequestState(8, 4096, 4096, 0, 512, torch.device("cpu")),
            adaptive_verification=None,
            pooling_runner=None,
            encoder_cache=None,
            pp_handler=None,
            prompt_logprobs_worker=None,
            sampler=None,
            is_last_pp_rank=False,
            block_tables=nothing,
            lora_state=nothing,
        )

    def add(self, requests: dict[str, tuple[int, Setting]]) -> None:
        """Requests by name, each with its prompt's length and what it asks for."""
        from vllm.v1.core.sched.output import NewRequestData

        new = [
            NewRequestData(
                name, [5] * length, [], params(setting), None, ([],), 0, None,
                prefill_token_ids=[5] * length,
            )
            for name, (length, setting) in requests.items()
        ]  # fmt: skip
        self.runner.add_requests(SimpleNamespace(scheduled_new_reqs=new))

    def forward(self, names: list[str], batch: Batch, padding: int = 0) -> torch.Tensor:
        """A step with these requests in this order."""
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.utils import AttentionGroup

        group, common = self.group, batch.common
        attention = AttentionGroup(
            group.layers[0].get_attn_backend(), group.names, group.spec, 0,
            metadata_builders=[group.builder],
        )  # fmt: skip
        table = self.runner.req_states.req_id_to_index
        places = np.array([table[name] for name in names], dtype=np.intp)
        rows = common.query_start_loc_cpu.diff().numpy()
        input_batch = SimpleNamespace(
            req_ids=names,
            num_reqs=len(names),
            num_tokens=common.num_actual_tokens,
            idx_mapping_np=places,
            query_start_loc=common.query_start_loc,
            query_start_loc_np=common.query_start_loc_cpu.numpy(),
            max_query_len=None,
            num_scheduled_tokens=rows,
            seq_lens=common.seq_lens,
            seq_lens_cpu_upper_bound=common.seq_lens,
            dcp_local_seq_lens=None,
            dcp_local_seq_lens_cpu_upper_bound=None,
            positions=None,
            is_prefilling_np=rows > 1,
            prompt_lens=None,
            fast_prefill=None,
        )
        built = self.runner.model_state.prepare_attn(
            input_batch,
            CUDAGraphMode.NONE,
            (common.block_table_tensor,),
            common.slot_mapping[None],
            [[attention]],
            SimpleNamespace(kv_cache_groups=[None]),
        )
        return group.forward(batch, metadata=built[group.names[0]])


def test_model_runner_v2_tells_what_requests_ask_for(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(engine_config(tiny_llama, section(TAU)))
    v2 = V2(group, monkeypatch)
    lengths = [(700, 700), (640, 1300), (129, 513), (300, 1100)]
    asked = [OFF, HIGH, DEFAULT, LOW]
    names = list("abcd")
    lens = [context + 100 for _, context in lengths]
    v2.add(dict(zip(names, zip(lens, asked, strict=True), strict=True)))
    # In another order than they came in.
    order = [2, 0, 3, 1]
    batch = group.batch([lengths[n] for n in order])
    out = v2.forward([names[n] for n in order], batch)
    with compat_requests._telling(Given([asked[n] for n in order], [lens[n] for n in order])):
        metadata = group.builder.build(0, batch.common)
    assert torch.equal(out, group.forward(batch, metadata=metadata))
    assert metadata.plan.calls == [(1.0, [0]), (0.5, [2]), (4.0, [3])]

    # A request's place is another's once it has left.
    v2.runner._remove_request("a")
    v2.add({"e": (700, DEFAULT)})
    assert v2.runner.req_states.req_id_to_index["e"] == 7
    alone = group.batch([(700, 700)])
    assert torch.equal(v2.forward(["e"], alone), forward(group, alone, []))
    assert not torch.equal(v2.forward(["e"], alone), group.base(alone))
    # One that goes on with another setting, as after a preemption.
    numbers = getattr(v2.runner.model_state, compat_requests._IDENTITY)
    before = numbers[7]
    v2.add({"e": (700, OFF)})
    assert before not in (0, numbers[7])
    assert torch.equal(v2.forward(["e"], alone), group.base(alone))
    assert compat_requests.prompt_lens(1) is None  # nobody tells between steps


def test_batches_that_vllm_makes_up_for_itself_are_not_counted(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to capture graphs, or to keep in step with a rank that has requests."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2Runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1Runner
    from vllm.v1.worker.gpu_worker import Worker as GpuWorker

    group = Group(engine_config(tiny_llama, section(TAU)))
    v2 = V2(group, monkeypatch)
    v2.add({"a": (300, DEFAULT)})
    batch = group.batch([(1, 300)])
    vars(v2.runner).update(
        speculator=None,
        lora_config=None,
        is_first_pp_rank=True,
        max_num_reqs=8,
        max_num_tokens=512,
        decode_query_len=1,
        kv_connector=SimpleNamespace(set_disabled=lambda _: None),
        execute_model=lambda *_, **__: v2.forward(["a"], batch),
    )
    before = counted(group)
    v2.runner._dummy_run(1, uniform_decode=True, skip_eplb=True)
    assert counted(group) == before
    v2.runner.execute_model()
    assert counted(group) == before | {"decode": before["decode"] + 1}
    others: list[Any] = [V2Runner.capture_model, GpuWorker.compile_or_warm_up_model]
    assert all(hasattr(it, compat_requests._WRAPPED) for it in (*others, V1Runner._dummy_run))
