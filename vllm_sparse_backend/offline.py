"""vLLM's offline engine inside this process, one after the other: for calibration and evaluation.

What a server does with a prompt (chunks, the paged cache, RoPE as served) is done here by the same
code; only HTTP is missing, and worker processes, so that counters and recordings are at hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from vllm_sparse_backend.compat import vllm_version
from vllm_sparse_backend.config import SECTION, refuse_overrides
from vllm_sparse_backend.demo.machine import gpu
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import ModelFacts

LONG_ROPE = ("longrope", "su")  # its `rope_type`, and what that was called before
Backend = Literal["dense", "sparse_prefill"]  # dense: what vLLM chooses by itself


@dataclass(frozen=True)
class EngineOptions:
    """What dense and sparse engines share."""

    model: str
    max_model_len: int
    chunk_tokens: int = 2048
    dtype: str = "bfloat16"
    hf_overrides: dict[str, Any] | None = None
    kv_gib: int = 4  # on a CPU; on a GPU the cache has what vLLM finds free
    prefix_caching: bool = False

    def identity(self) -> dict[str, Any]:
        """What results depend on; another training or configuration in the same folder is another
        model."""
        folder = Path(self.model)
        weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        config = _config_of(self.model)
        decides = {
            "vllm": vllm_version(),
            "model": self.model,
            "weights": [[it.name, it.stat().st_size, it.stat().st_mtime_ns] for it in weights],
            "config": sha256(config.encode()).hexdigest(),
            "dtype": self.dtype,
            "chunk_tokens": self.chunk_tokens,
            "hf_overrides": self.hf_overrides,
        }
        if (device := gpu()) is not None:  # its numbers differ in the last bits
            decides["gpu"] = device
        # By its limit, and not a prompt's length, vLLM chooses LongRoPE's short or long factors.
        if any(f'"{name}"' in config + json.dumps(self.hf_overrides) for name in LONG_ROPE):
            decides["max_model_len"] = self.max_model_len
        return decides

    def arguments(self, backend: Backend, sparse_config: dict[str, Any]) -> dict[str, Any]:
        """Of `vllm.LLM`. `sparse_config` goes to the sparse side only: the other ignores it."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "enforce_eager": True,
            "enable_prefix_caching": self.prefix_caching,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.chunk_tokens,
            "max_num_seqs": 8,
            "disable_log_stats": False,
            "hf_overrides": self.hf_overrides or {},
            "use_tqdm_on_load": False,
        }
        if backend == "sparse_prefill":
            arguments["attention_backend"] = backend
            if sparse_config:
                arguments["additional_config"] = {SECTION: sparse_config}
        return arguments


def _config_of(model: str) -> str:
    """A model's config.json, of a hub name as it was last downloaded; "" if it is not here."""
    file: Any = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(model, file.name)  # a path, None, or a mark of its own
    return Path(file).read_text(encoding="utf-8") if isinstance(file, str | Path) else ""


def kv_gib(facts: ModelFacts, tokens: int, dtype: str) -> int:
    """GiB of KV cache for one prompt of so many tokens in every layer, and a tenth to spare."""
    bytes_each = 4 if dtype == "float32" else 2
    of_token = facts.num_layers * 2 * facts.num_kv_heads * facts.head_dim * bytes_each
    return math.ceil(1.1 * tokens * of_token / 2**30)


def refuse_lone_row(tokens: int, chunk_tokens: int) -> None:
    """Raise Refused where the last token of a prompt would be a step of its own on a GPU: whatever
    is as short as decode stays with the base backend there, and nobody would see that row."""
    if tokens % chunk_tokens == 1 and gpu() is not None:
        raise Refused(
            f"a prompt of {tokens} tokens in steps of {chunk_tokens}: want no last step of one "
            "token, which is not looked at on a GPU; choose another length"
        )


@contextmanager
def engine(
    options: EngineOptions, backend: Backend, sparse_config: dict[str, Any] | None = None
) -> Iterator[Any]:
    """A `vllm.LLM` that computes in this process; leaving the context frees it.

    Call before vLLM has been imported, or with its environment as it is set here: what it says of
    CPUs a GPU's platform does not read, and takes the memory that is free. Raises
    ConfigError for a variable that would override what `sparse_config` has.
    """
    refuse_overrides(sparse_config or {})
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib),
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if os.path.isdir(options.model):
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the folder; ask nobody
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**options.arguments(backend, sparse_config or {}))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
