"""Where requests come in: what they ask for is checked, and their cache salts are composed.

In API servers and offline engines; each place is wrapped once in a process. Seen with vLLM 0.32 and
the Python files of 0.33; imports vLLM only inside functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend import compat, control
from vllm_sparse_backend.control import ControlError, Setting

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Admission = Callable[[Mapping[str, Any] | None], Setting]  # raises ControlError

_WRAPPED = "_sparse_prefill_wrapped"
_ADMISSION = "_sparse_prefill_admission"
_admission: Admission | None = None  # of this process's engine, the last one made
# The streaming session whose inputs come in here, and its setting.
_session: ContextVar[tuple[str, Setting] | None] = ContextVar("sparse_prefill", default=None)


def admit_requests(admission_of: Callable[[VllmConfig], Admission]) -> None:
    """Have every engine with our backend ask an admission, made of its configuration, for each
    request's setting, before the request is sent to the engine's core.

    What is refused is a ValueError: in Python as it is, over HTTP a 400 with its message.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    make, process = InputProcessor.__init__, InputProcessor.process_inputs
    if hasattr(process, _WRAPPED):
        return

    @functools.wraps(make)
    def init(self: Any, vllm_config: VllmConfig, *rest: Any, **more: Any) -> None:
        global _admission  # noqa: PLW0603
        if compat.is_selected(vllm_config):
            _check_early()
            _admission = admission_of(vllm_config)
            setattr(self, _ADMISSION, _admission)
        make(self, vllm_config, *rest, **more)

    @functools.wraps(process)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **more: Any
    ) -> Any:
        admission: Admission | None = getattr(self, _ADMISSION, None)
        if admission is None:
            return process(self, request_id, prompt, params, *rest, **more)
        extra_args = getattr(params, "extra_args", None)  # of pooling there is none
        setting = admission(extra_args)
        request = process(self, request_id, prompt, params, *rest, **more)
        if request.resumable:
            _stay(request_id, setting)
        request.cache_salt = control.salted(setting, request.cache_salt)
        if extra_args and control.FIELD in extra_args:
            # The request's own parameters, but maybe the caller's dictionary.
            request.sampling_params.extra_args = control.admitted(extra_args, setting)
        return request

    setattr(process_inputs, _WRAPPED, True)
    InputProcessor.__init__ = init
    InputProcessor.process_inputs = process_inputs


def _stay(request_id: str, setting: Setting) -> None:
    """Raise ControlError if an input of a streaming session asks for another setting than the
    first, whose salt all blocks of the session have.

    vLLM takes a session's inputs in a task of its own: what is remembered ends with its context.
    """
    known = _session.get()
    if known is None or known[0] != request_id:
        _session.set((request_id, setting))
    elif known[1] != setting:
        raise ControlError(
            f"{control.FIELD}: want {known[1].text!r} in all inputs of a streaming session, as in "
            f"its first, got {setting.text!r}"
        )


def _check_early() -> None:
    """Have the OpenAI endpoints ask before they answer, once.

    An engine is handed a request when its answer is being written: a stream's status is 200 by
    then. And vLLM's beam search has parameters of its own, without the extra arguments.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest

    searching = (
        ChatCompletionRequest,
        CompletionRequest,
        TranscriptionRequest,
        TranslationRequest,
    )
    for kind in (*searching, ResponsesRequest):
        kind.to_sampling_params = _after(_check_setting, kind.to_sampling_params)
    for kind in searching:
        kind.to_beam_search_params = _after(_refuse_setting, kind.to_beam_search_params)


def _after(check: Callable[[Any], None], convert: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(convert, _WRAPPED):
        return convert

    @functools.wraps(convert)
    def checked(self: Any, *rest: Any, **more: Any) -> Any:
        check(self.vllm_xargs)
        return convert(self, *rest, **more)

    setattr(checked, _WRAPPED, True)
    return checked


def _check_setting(xargs: Any) -> None:
    (_admission or control.asked)(xargs)


def _refuse_setting(xargs: Any) -> None:
    if control.asked(xargs) is not None:
        raise ControlError(
            f"{control.FIELD}: want a request without use_beam_search: vLLM's beam search takes "
            "no vllm_xargs"
        )
