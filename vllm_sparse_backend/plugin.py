"""vLLM's way in: called in every vLLM process of a machine that has the package installed.

Hence light (no torch kernel, no triton, nothing that vLLM has not imported already), idempotent
and silent: an exception here would end servers that never asked for this backend. What is wrong
is said when the backend is *selected*.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse_backend import compat_admission

logger = logging.getLogger("vllm.sparse_prefill")


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Never raises."""
    try:
        _register()
    except Exception:
        logger.warning(
            "The attention backend sparse_prefill could not be registered; "
            "other backends are not affected",
            exc_info=True,
        )


def registered_member() -> Any:
    """The backend's member of vLLM's registry, registered if need be: what it unpickles to.

    A front end may have its configuration from another process, and be told of no start: Ray's
    replicas on GPUs.
    """
    from vllm_sparse_backend import compat, compat_admission

    _register()
    compat_admission.admit_requests(_admission)
    return compat.backend_member()


def _register() -> None:
    from vllm_sparse_backend import compat, config

    compat.register_backend(unpickle=registered_member)
    compat.wrap_platform(on_start=_on_start, gpu_path=_gpu_path)
    compat.accept_environment(config.environment_names())


def _on_start(vllm_config: VllmConfig) -> None:
    from vllm_sparse_backend import compat_admission
    from vllm_sparse_backend.backend.start import check

    check(vllm_config)
    compat_admission.admit_requests(_admission)


def _admission(vllm_config: VllmConfig) -> compat_admission.Admission:
    from vllm_sparse_backend.backend.admission import Admission
    from vllm_sparse_backend.backend.start import check

    check(vllm_config)  # once more, or, where the configuration was unpickled, for the first time
    return Admission(vllm_config)


def _gpu_path(selector_config: Any, capability: Any) -> str:
    from vllm_sparse_backend.backend.cuda import backend_for

    module, name = backend_for(selector_config, capability).full_cls_name()
    return f"{module}.{name}"
