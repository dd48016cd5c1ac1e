"""The attention backend: which requests and layers are sparse, and the classes vLLM runs."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # vLLM resolves the class by this module's name, whatever the platform.
    if name != "SparsePrefillBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        from vllm_sparse_backend.errors import SparsePrefillError

        raise SparsePrefillError(
            f"platform: want cpu, got {current_platform.device_name}: this version of "
            "vllm-sparse-backend has a CPU backend only"
        )
    from vllm_sparse_backend.backend.cpu import SparsePrefillCPUBackend

    return SparsePrefillCPUBackend
