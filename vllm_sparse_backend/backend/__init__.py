"""The attention backend: which requests and layers are sparse, and the classes vLLM runs."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # vLLM resolves the class by this module's name, whatever the platform.
    if name != "SparsePrefillBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_sparse_backend import compat

    if compat.supported_platform() == "cpu":
        from vllm_sparse_backend.backend.cpu import SparsePrefillCPUBackend

        return SparsePrefillCPUBackend
    from vllm_sparse_backend.backend.cuda import backends

    return backends()[0]
