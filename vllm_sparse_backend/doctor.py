"""What is installed, what would be used, and why not: the facts behind `vllm-sparse doctor`."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend import __version__, compat, config
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.profile import ModelFacts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ENTRY_POINT = "sparse_prefill"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True)


class Core(_Report):
    """The compiled CPU core."""

    isas: dict[str, bool] = {}  # compiled: whether this machine can run it; best first
    active: str | None = None
    problem: str | None = None


class Gpu(_Report):
    """The GPU that the kernels would run on, where vLLM is built for one."""

    name: str
    capability: str  # of computing, as "9.0"
    triton: str | None  # its version
    fp4: bool = False  # codes of "bits": "fp4" are multiplied as such, and not as int8
    problem: str | None = None


class Layer(_Report):
    """One layer of the model, as far as its configuration tells."""

    index: int
    path: str  # sparse or dense
    reason: str | None


class Model(_Report):
    """What would happen if this model were served."""

    path: str
    facts: ModelFacts | None = None
    profile: str | None = None  # name and digest, or what is used instead
    layers: list[Layer] = []
    warnings: list[str] = []
    problem: str | None = None  # what would stop the start


class Diagnosis(_Report):
    """All of it. ``problems`` is empty if `--attention-backend sparse_prefill` would work."""

    package: str
    vllm: str | None
    vllm_wanted: str
    torch: str | None
    platform: str | None = None
    registered: bool = False
    core: Core
    gpu: Gpu | None = None
    selectors: dict[str, str]  # list selectors by name: its class, or why it is unusable
    environment: dict[str, str]
    plugins: list[str] | None  # VLLM_PLUGINS; None: all are loaded
    model: Model | None = None
    advice: list[str]  # what would make it faster
    problems: list[str]


def examine(
    model: str | None = None, profile: str | None = None, options: Sequence[str] = ()
) -> Diagnosis:
    """Look at this machine and, if one is given, at a model with a profile.

    ``model``: a folder or a name, as `vllm serve` takes it; ``profile``: a profile's path;
    ``options``: what else would stand behind `vllm serve`.
    """
    problems = []
    version, plugins = compat.vllm_version(), config.allowed_plugins()
    supported = compat.is_supported(version)
    if not supported:
        problems.append(f"vLLM: want {compat.SUPPORTED}, got {version}")
    if plugins is not None and ENTRY_POINT not in plugins:
        problems.append(f"VLLM_PLUGINS: want {ENTRY_POINT} among the names, got {plugins}")
    core = _core()
    try:
        config.load_config(None)
    except SparsePrefillError as error:
        problems.append(str(error))
    selectors, wrong = _selectors()
    problems += wrong
    platform, registered, gpu, served = None, False, None, None
    if supported:
        with quiet():
            platform, registered = _in_vllm()
            runs = platform in compat.PLATFORMS
            if not runs:
                problems.append(
                    f"vLLM's platform: want one of {', '.join(compat.PLATFORMS)}, got {platform}"
                )
            elif platform != "cpu":
                gpu = _gpu(platform)
            if not registered and (plugins is None or ENTRY_POINT in plugins):
                problems.append("vLLM loads its plugins but does not know the backend afterwards")
            if model is not None and registered and runs:
                served = _served(model, profile, options)
                problems += [served.problem] if served.problem else []
    # Only what would compute can be wrong: a GPU's machine needs no compiled core.
    if problem := core.problem if gpu is None else gpu.problem:
        problems.insert(0, problem)
    return Diagnosis(
        package=__version__,
        vllm=version,
        vllm_wanted=compat.SUPPORTED,
        torch=_version("torch"),
        platform=platform,
        registered=registered,
        core=core,
        gpu=gpu,
        selectors=selectors,
        environment=config.overrides_in(),
        plugins=plugins,
        model=served,
        advice=_advice() if gpu is None else [],
        problems=list(dict.fromkeys(problems)),  # the model's may repeat one
    )


def _advice() -> list[str]:
    """What would make prefill on CPU faster, and is for whoever starts the server to set."""
    open_to_all = HUGE_PAGES.is_file() and "[madvise]" in HUGE_PAGES.read_text()
    if config.asks_for_huge_pages() or not open_to_all:
        return []
    return [
        "THP_MEM_ALLOC_ENABLE=1 in the server's environment has torch use huge pages, which "
        "saves prefill some tenth of its time"
    ]


def _core() -> Core:
    if _version("torch") is None:
        return Core(problem="torch is not installed")
    from vllm_sparse_backend.ops.cpu import core

    try:
        isas = core.isas()
    except core.CoreUnavailable as error:
        return Core(problem=str(error))
    try:
        return Core(isas=isas, active=core.active_isa())
    except core.CoreUnavailable as error:
        return Core(isas=isas, problem=str(error))


def _selectors() -> tuple[dict[str, str], list[str]]:
    """List selectors by name, and what would stop a start. None of them without torch."""
    if _version("torch") is None:
        return {}, []
    from vllm_sparse_backend.selection import registry

    found = {}
    try:
        for name, entry in registry.known().items():
            try:
                registry.find(name)
                found[name] = entry.value
            except SparsePrefillError as error:  # stops the start of who names it, nobody else's
                found[name] = f"unusable: {error}"
    except SparsePrefillError as error:
        return {}, [str(error)]
    return found, []


def _gpu(platform: str) -> Gpu:
    from vllm_sparse_backend.ops.triton.launch import packs

    triton = _version("triton")
    name, capability = compat.gpu()
    prefix, suffix = ("sm_", "") if platform == "cuda" else ("gfx", "0")
    return Gpu(
        name=name,
        capability=capability,
        triton=triton,
        fp4=packs(prefix + capability.replace(".", "") + suffix, "fp4"),
        problem=None if triton else "triton is not installed",
    )


def _in_vllm() -> tuple[str, bool]:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return compat.platform(), compat.is_registered()


def _served(path: str, profile: str | None, options: Sequence[str]) -> Model:
    """What vLLM's own configuration makes of the model; raises for nothing that is its fault."""
    from vllm_sparse_backend.backend import expect, start

    try:
        vllm_config = configuration(path, profile, options)
    except SparsePrefillError as error:
        return Model(path=path, problem=str(error))
    setup = start.resolve(vllm_config)
    reasons = expect.reasons(
        vllm_config, start.capabilities(setup.platform), enabled=setup.config.enabled
    )
    return Model(
        path=path,
        facts=start.facts_of(vllm_config.model_config),
        profile=setup.policies(),
        layers=[
            Layer(index=i, path="dense" if reason else "sparse", reason=reason)
            for i, reason in enumerate(reasons)
        ],
        warnings=start.warnings(setup, vllm_config),
    )


def model_facts(path: str) -> ModelFacts:
    """A model's numbers, by vLLM's own configuration. Raises SparsePrefillError."""
    with quiet():
        vllm_config = configuration(path)
        from vllm_sparse_backend.backend import start

        return start.facts_of(vllm_config.model_config)


def configuration(path: str, profile: str | None = None, options: Sequence[str] = ()) -> VllmConfig:
    """vLLM's own configuration to serve a model with this backend; raises SparsePrefillError for
    whatever vLLM says to that. A packaged model goes by its name here, too.

    ``options``: of `vllm serve`; without any, nothing is compiled and defaults apply.
    """
    from vllm_sparse_backend.demo.model import folder_of

    try:
        from vllm.engine.arg_utils import EngineArgs

        given: dict[str, Any] = {"enforce_eager": True}
        if options:
            given = compat.engine_arguments(options)
        if given.pop("model", None) not in (None, path):
            raise SparsePrefillError(f"options: want no model but that of --model, {path}")
        if not _names_backend(given):
            given["attention_backend"] = ENTRY_POINT
        given["additional_config"] = _with_profile(given.get("additional_config") or {}, profile)
        given |= {"model": folder_of(path), "skip_tokenizer_init": True}
        vllm_config = EngineArgs(**given).create_engine_config()
    except SparsePrefillError:
        raise
    # Whatever it raises, it is the answer to the question.
    except Exception as error:
        raise SparsePrefillError(f"vLLM cannot serve {path}: {error}") from error
    if not compat.is_selected(vllm_config):
        raise SparsePrefillError(f"options: want the attention backend {ENTRY_POINT}, or none")
    return vllm_config


def _names_backend(given: Mapping[str, Any]) -> bool:
    attention = given.get("attention_config")
    more = attention and (attention.backend or attention.backend_per_kind)
    return bool(given.get("attention_backend") or more)


def _with_profile(additional: Any, profile: str | None) -> dict[str, Any]:
    if not isinstance(additional, Mapping):
        raise SparsePrefillError(f"--additional-config: want a JSON object, got {additional!r}")
    section = additional.get(config.SECTION, {})
    if profile is None or not isinstance(section, Mapping):  # the configuration says what is wrong
        return {**additional, config.SECTION: section}
    if (other := section.get("profile")) is not None:
        raise SparsePrefillError(f"--profile: want one, got {profile}, and {other} in the options")
    return {**additional, config.SECTION: {**section, "profile": str(Path(profile))}}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without vLLM's lines about what it does, which are not what was asked; and what is
    written to stdout all the same is not in the way of JSON."""
    with contextlib.redirect_stdout(sys.stderr), config.vllm_log_level("CRITICAL"):
        import vllm.logger  # noqa: F401  (sets its own level, from the environment)

        logger = logging.getLogger("vllm")
        before = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
