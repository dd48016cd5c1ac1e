"""What vLLM does not tell attention of the requests of a batch.

In a worker, while the metadata of a batch is made, the model runner knows the requests: how long
their prompts are, of which a step may hold a part, and what they ask for; or that there are none.
It is wrapped once in a process. Seen with vLLM 0.32; imports vLLM only inside functions.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vllm_sparse_backend import control
from vllm_sparse_backend.control import DEFAULT, ControlError, Setting

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.sparse_prefill")

_WRAPPED = "_sparse_prefill_wrapped"
_SETTINGS = "_sparse_prefill_settings"
_PROMPTS = "_sparse_prefill_prompts"
_IDENTITY = "_sparse_prefill_identity"
_numbers = itertools.count(1)  # of requests, in this process
NOBODY = 0  # the number of what a runner makes up for itself
_MOST_WARNINGS = 16
_warned: set[str] = set()  # the first so many


class Told(Protocol):
    """What a model runner knows of the batch that metadata is being built for."""

    def prompt_lens(self, num_reqs: int) -> torch.Tensor:
        """Int32 [num_reqs]."""

    def settings(self, num_reqs: int) -> list[Setting]:
        """Of the first ``num_reqs``, or of fewer where the rest is padding."""

    def identities(self, num_reqs: int) -> list[int]:
        """Likewise; see `identities`."""


_told: Told | None = None
_made_up = False


def is_made_up() -> bool:
    """Whether the batch that metadata is being built for is nobody's: vLLM's own, to warm up, to
    capture graphs, or to keep in step with other ranks."""
    return _made_up


def prompt_lens(num_reqs: int) -> torch.Tensor | None:
    """The lengths of the prompts of the batch that metadata is being built for, int32 [R].

    None where nobody tells: outside of a model runner's own building, as a draft model's metadata
    is made.
    """
    return None if _told is None else _told.prompt_lens(num_reqs)


def settings(num_reqs: int) -> list[Setting]:
    """What the requests of that batch ask for; those that are missing ask for nothing."""
    return [] if _told is None else _told.settings(num_reqs)


def identities(num_reqs: int) -> list[int] | None:
    """A number for each request of that batch, the same in all of its steps, and of no other
    request in this process, whatever their names; NOBODY for none. None where nobody tells."""
    return None if _told is None else _told.identities(num_reqs)


def why_untold(vllm_config: VllmConfig) -> str | None:
    """Why no request's setting can reach attention; None: it can."""
    if vllm_config.parallel_config.use_ubatching and not vllm_config.use_v2_model_runner:
        return "model runner V1 cuts batches into microbatches here (dual batch overlap)"
    return None


def watch_requests(vllm_config: VllmConfig) -> None:
    """Have this engine's model runner tell of its batches; in a worker, once."""
    if vllm_config.use_v2_model_runner:
        _watch_v2()
    else:
        _watch_v1()


def _watch_made_up(*methods: tuple[Any, str]) -> None:
    """Have `is_made_up` know what these methods, as (class, name), build."""
    for kind, name in methods:
        method = getattr(kind, name)
        if not hasattr(method, _WRAPPED):
            setattr(kind, name, _making_up(method))


def _making_up(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def made_up(*arguments: Any, **named: Any) -> Any:
        global _made_up  # noqa: PLW0603
        before, _made_up = _made_up, True
        try:
            return method(*arguments, **named)
        finally:
            _made_up = before

    setattr(made_up, _WRAPPED, True)
    return made_up


@contextmanager
def _telling(told: Told) -> Iterator[None]:
    global _told  # noqa: PLW0603
    before, _told = _told, told
    try:
        yield
    finally:
        _told = before


@dataclass(frozen=True, slots=True)
class _OfV1:
    runner: Any

    def prompt_lens(self, num_reqs: int) -> torch.Tensor:
        lens: torch.Tensor = self.runner.input_batch.num_prompt_tokens_cpu_tensor
        return lens[:num_reqs].clone()

    def settings(self, num_reqs: int) -> list[Setting]:
        requests = self.runner.requests
        return [
            _received(requests[name].sampling_params)
            for name in self.runner.input_batch.req_ids[:num_reqs]
        ]

    def identities(self, num_reqs: int) -> list[int]:
        # The runner makes a new state where a name comes again.
        requests = self.runner.requests
        states = [requests[name] for name in self.runner.input_batch.req_ids[:num_reqs]]
        return [vars(state).setdefault(_IDENTITY, next(_numbers)) for state in states]


def _watch_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _watch_made_up((GPUModelRunner, "_dummy_run"))
    build = GPUModelRunner._build_attention_metadata
    if hasattr(build, _WRAPPED):
        return

    @functools.wraps(build)
    def build_attention_metadata(self: Any, *arguments: Any, **named: Any) -> Any:
        with _telling(_OfV1(self)):
            return build(self, *arguments, **named)

    setattr(build_attention_metadata, _WRAPPED, True)
    GPUModelRunner._build_attention_metadata = build_attention_metadata


@dataclass(frozen=True, slots=True)
class _OfV2:
    places: Any  # int [R]: the requests' places in the runner's table
    prompts: Any  # int32 [most requests]: by place
    by_place: list[Setting]
    numbers: list[int]  # by place

    def prompt_lens(self, num_reqs: int) -> torch.Tensor:
        import torch

        lens = torch.zeros(num_reqs, dtype=torch.int32)  # 0: padding
        told = torch.from_numpy(self.prompts[self.places[:num_reqs]])
        lens[: len(told)] = told
        return lens

    def settings(self, num_reqs: int) -> list[Setting]:
        return [self.by_place[place] for place in self.places[:num_reqs].tolist()]

    def identities(self, num_reqs: int) -> list[int]:
        return [self.numbers[place] for place in self.places[:num_reqs].tolist()]


def _watch_v2() -> None:
    """V2 forgets a request's parameters once its sampler has them: they are kept when it is added.

    Metadata is built by a model's state, of which there are several classes, from whole batches or
    from microbatches; both know their requests' places in the runner's table.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    _watch_made_up(
        (GPUModelRunner, "_dummy_run"),
        (GPUModelRunner, "capture_model"),  # also to see how much memory graphs take
        (Worker, "compile_or_warm_up_model"),  # requests of its own, to compile kernels with
    )
    add = GPUModelRunner.add_requests
    if hasattr(add, _WRAPPED):
        return

    @functools.wraps(add)
    def add_requests(self: Any, scheduler_output: Any, *rest: Any, **more: Any) -> Any:
        added = add(self, scheduler_output, *rest, **more)
        state, table = self.model_state, self.req_states
        _watch_state(type(state))
        if not hasattr(state, _SETTINGS):
            setattr(state, _SETTINGS, [DEFAULT] * table.max_num_reqs)
            setattr(state, _PROMPTS, table.prompt_len.np)
            setattr(state, _IDENTITY, [NOBODY] * table.max_num_reqs)
        for new in scheduler_output.scheduled_new_reqs:
            place = table.req_id_to_index[new.req_id]
            getattr(state, _SETTINGS)[place] = _received(new.sampling_params)
            getattr(state, _IDENTITY)[place] = next(_numbers)
        return added

    setattr(add_requests, _WRAPPED, True)
    GPUModelRunner.add_requests = add_requests


def _watch_state(kind: Any) -> None:
    prepare = kind.prepare_attn
    if hasattr(prepare, _WRAPPED):
        return

    @functools.wraps(prepare)
    def prepare_attn(self: Any, input_batch: Any, *rest: Any, **more: Any) -> Any:
        if not hasattr(self, _SETTINGS):  # nothing but dummies so far
            return prepare(self, input_batch, *rest, **more)
        places = input_batch.idx_mapping_np
        known = (getattr(self, name) for name in (_PROMPTS, _SETTINGS, _IDENTITY))
        with _telling(_OfV2(places, *known)):
            return prepare(self, input_batch, *rest, **more)

    setattr(prepare_attn, _WRAPPED, True)
    kind.prepare_attn = prepare_attn


def _received(params: Any) -> Setting:
    try:
        return control.received(None if params is None else params.extra_args)
    except ControlError as error:
        _warn(str(error))
        return DEFAULT


def _warn(message: str) -> None:
    if message not in _warned and len(_warned) < _MOST_WARNINGS:
        _warned.add(message)
        logger.warning("sparse_prefill: %s; it is not followed", message)
