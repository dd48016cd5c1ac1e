"""What is served, worked out from vLLM's configuration: at start, before any weights are loaded,
and again, to the same result, in every worker.

`check` stops the start with one message if anything is wrong with configuration, profile or
machine. Workers are spawned and get nothing but the pickled configuration and the environment:
they `resolve` it once more. Between the two the profile's file may have changed, or, on another
node, be another one: its digest travels with the configuration, and must be what a worker loads.
"""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_sparse_backend import compat
from vllm_sparse_backend.backend import expect
from vllm_sparse_backend.backend.plan import Capabilities
from vllm_sparse_backend.config import SECTION, SparseConfig, load_config, session_directory
from vllm_sparse_backend.errors import (
    ConfigError,
    ProfileMismatch,
    SparsePrefillError,
    describe,
    hide_traceback,
)
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.profile import ModelFacts, Profile, load_profile
from vllm_sparse_backend.profiles import shipped_for
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, Policy, keeps_all, registry

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.sparse_prefill")

SHORT_DIGEST = len("sha256:") + 12  # enough to tell profiles apart in a log
NO_ISA = "none"
GPU_CORE = "triton"  # in an instruction set's place
DENSITY_FIGURE = "density_"  # and tokens: among the figures of a profile's calibration
MOST_LENGTHS = 16
CPU_FIELDS = ("cpu_isa", "dense_core")  # of the configuration, without a meaning elsewhere
GPU_FIELDS = ("kept_prompts",)


@dataclass(frozen=True)
class Setup:
    """What one server runs with."""

    config: SparseConfig
    isa: str  # of the CPU core, or GPU_CORE; NO_ISA where it is switched off
    profile: Profile | None
    shipped: bool = False  # the profile is one that comes with the package
    platform: str = "cpu"  # one of compat.PLATFORMS
    facts: ModelFacts | None = None  # of the served model; None: of parts alone

    @property
    def on_cpu(self) -> bool:
        """Whether the compiled core computes; else the GPU's kernels do."""
        return self.platform == "cpu"

    @property
    def uniform(self) -> Policy:
        """Every head's policy where there is no profile."""
        return self.config.policy or UNIFORM_DEFAULT

    def common(self) -> dict[str, Any]:
        """What all ranks of a server must have in common, by name: what decides which rows and
        tiles are left out. Instruction sets may differ, as nodes do.
        """
        of_a_rank = {"profile", "profile_digest", "policy", "cpu_isa"}
        profile = self.profile.digest if self.profile else None
        policy = None if self.profile else self.uniform.model_dump(mode="json")
        return {
            "profile": profile,
            "policy": policy,
            **self.config.model_dump(mode="json", exclude=of_a_rank),
        }

    @property
    def shape(self) -> tuple[int, int]:
        """Layers of the model and query heads of each, over all ranks; 0 where unknown."""
        facts = self.facts or (self.profile and self.profile.model)
        return (facts.num_layers, facts.num_heads) if facts else (0, 0)

    def expected_density(self) -> dict[str, float]:
        """What the profile's calibration came to, by tokens of context; of few lengths, which
        become labels.
        """
        calibration = self.profile.calibration if self.profile else None
        figures = calibration.figures if calibration else {}
        by_tokens = {
            int(name.removeprefix(DENSITY_FIGURE)): density
            for name, density in figures.items()
            if name.startswith(DENSITY_FIGURE) and name.removeprefix(DENSITY_FIGURE).isdecimal()
        }
        return {str(tokens): by_tokens[tokens] for tokens in sorted(by_tokens)[:MOST_LENGTHS]}

    def labels(self) -> dict[str, str]:
        """The labels of the info metric."""
        from vllm_sparse_backend import __version__

        return {
            "isa": self.isa,
            "profile": self.profile.name if self.profile else "uniform",
            "digest": self.profile.digest if self.profile else "",
            "version": __version__,
        }

    def policies(self) -> str:
        """Which policies apply, in a few words."""
        if self.profile is None:
            return f"no profile, every head {_brief(self.uniform)}"
        digest = self.profile.digest[:SHORT_DIGEST]
        origin = ", shipped" if self.shipped else ""
        defaults = _brief(self.profile.defaults)
        return f"profile {self.profile.name} ({digest}{origin}), defaults {defaults}"

    def describe(self) -> str:
        """What runs, in a few words that follow "sparse_prefill: "."""
        base = "CPU_ATTN" if self.on_cpu else "FLASH_ATTN or TRITON_ATTN"
        if not self.config.enabled:
            return f"switched off, everything is computed by {base}"
        platform = {"cpu": "CPU", "cuda": "CUDA", "rocm": "ROCm"}[self.platform]
        return (
            f"prefill on {platform} with {self.isa}, the rest by {base}; {self.policies()}; "
            f"sparse from {self.config.min_prompt_tokens} tokens of context and "
            f"{self.config.min_query_tokens} of a step on"
        )


def resolve(vllm_config: VllmConfig) -> Setup:
    """What to run with. Raises SparsePrefillError; the message says what to change."""
    config = load_config(vllm_config.additional_config)
    platform = compat.supported_platform()
    isa = _use_core(config, platform)
    model = vllm_config.model_config
    if model is None:  # a configuration of parts, as tests and tools make them
        return Setup(config, isa, None, platform=platform)
    facts = facts_of(model)
    if config.profile is not None:
        profile = load_profile(config.profile)
        profile.match(facts)
        setup = Setup(config, isa, profile, platform=platform, facts=facts)
    else:
        shipped = None if config.policy else shipped_for(facts.digest)
        is_shipped = shipped is not None
        setup = Setup(config, isa, shipped, is_shipped, platform, facts)
    _expect_digest(setup)
    return setup


def check(vllm_config: VllmConfig) -> None:
    """Resolve, say what will run, and make ready to count it. Called by vLLM while it puts its
    configuration together, possibly several times in a process; says the same thing once.
    """
    try:
        registry.known()  # two of one name are an error whoever is asked for
        setup = resolve(vllm_config)
    except SparsePrefillError:
        hide_traceback()
        raise
    if vllm_config.model_config is None:
        return
    _pass_on_digest(vllm_config, setup)
    # Not before all is well. Imported here since prometheus_client, once imported, is set in
    # its ways, and vLLM may still have a word to say about those.
    from vllm_sparse_backend.metrics.prometheus import export_from_here
    from vllm_sparse_backend.metrics.session import open_session

    announced = session_directory()
    directory = open_session()
    export_from_here(directory)
    if directory == announced and multiprocessing.parent_process() is not None:
        return  # the parent has said it
    _say(logging.INFO, f"sparse_prefill: {setup.describe()}")
    for warning in warnings(setup, vllm_config):
        _say(logging.WARNING, f"sparse_prefill: {warning}")


def warnings(setup: Setup, vllm_config: VllmConfig) -> list[str]:
    """What the user should know although it is no error."""
    if not setup.config.enabled:
        return []
    said = []
    if setup.profile is None and setup.config.policy is None:
        said.append(
            "no profile was named and none of this model's comes with the package: every head "
            "gets the same conservative default, which is slower than a calibrated profile"
        )
    reasons = expect.reasons(vllm_config, capabilities(setup.platform))
    if None not in reasons:
        counted = ", ".join(sorted({str(reason) for reason in reasons}))
        said.append(f"every layer of this model will be computed dense: {counted}")
    if setup.on_cpu and (slow := _never_pays(setup, vllm_config.model_config.get_head_size())):
        said.append(
            f"these policies are never faster than keeping every tile with {setup.isa}, so their "
            f"heads keep all: {slow}"
        )
    if vllm_config.model_config.max_model_len < setup.config.min_prompt_tokens:
        said.append(
            f"every request will be computed dense: max_model_len is "
            f"{vllm_config.model_config.max_model_len}, sparse prefill starts at "
            f"{setup.config.min_prompt_tokens} tokens (min_prompt_tokens)"
        )
    return said


def capabilities(platform: str | None = None) -> Capabilities:
    """What is computed on one of compat.PLATFORMS, this process's unless given: by the compiled
    core, or by the GPU's kernels, which take any layout.
    """
    if (platform or compat.supported_platform()) == "cpu":
        from vllm_sparse_backend.ops.cpu import core

        return Capabilities(core.HEAD_DIMS, core.DTYPES, core.KV_LAYOUTS)
    from vllm_sparse_backend.ops import triton as kernels

    dtypes = [str(dtype).removeprefix("torch.") for dtype in kernels.DTYPES]
    return Capabilities(kernels.HEAD_DIMS, dtypes, ())


def facts_of(model: ModelConfig) -> ModelFacts:
    """The served model's numbers. Raises SparsePrefillError for one without attention."""
    try:
        return compat.model_facts(model)
    except ValidationError as error:
        raise SparsePrefillError(
            f"model {model.model}: want a model with attention layers ({describe(error)}); "
            "choose another --attention-backend"
        ) from None


def _use_core(config: SparseConfig, platform: str) -> str:
    others, device = (GPU_FIELDS, "GPU") if platform == "cpu" else (CPU_FIELDS, "CPU")
    if given := config.model_fields_set.intersection(others):
        fields = ", ".join(sorted(given))
        raise ConfigError(f"{fields}: want it on a {device} only, got it on platform {platform}")
    if not config.enabled:
        return NO_ISA
    if platform != "cpu":
        return GPU_CORE
    from vllm_sparse_backend.ops.cpu import core

    try:
        core.set_isa(config.cpu_isa)
        return core.active_isa()
    except core.CoreUnavailable as error:
        raise SparsePrefillError(str(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _expect_digest(setup: Setup) -> None:
    wanted, profile = setup.config.profile_digest, setup.profile
    if wanted is None or (profile is not None and profile.digest == wanted):
        return
    origin = setup.config.profile or "that comes with the package"
    came = "no profile" if profile is None else f"{profile.digest} of the profile {origin}"
    raise ProfileMismatch(
        f"profile_digest: want {wanted}, which was configured or is what the server's first "
        f"process has loaded, got {came}; it must be the same in every process and on every node"
    )


def _pass_on_digest(vllm_config: VllmConfig, setup: Setup) -> None:
    """Have the processes to come, which get this configuration, load the same profile or none."""
    if setup.profile is None:
        return
    # Not in place: the user's own dictionary may configure another engine, with a newer file.
    additional: Any = vllm_config.additional_config or {}
    section = {**additional.get(SECTION, {}), "profile_digest": setup.profile.digest}
    vllm_config.additional_config = {**additional, SECTION: section}


def _never_pays(setup: Setup, head_dim: int) -> str:
    """The sparse policies that the cost model sees no length for, in a few words."""
    profile = setup.profile
    policies = {setup.uniform} if profile is None else profile.kinds()
    return "; ".join(
        sorted(
            _brief(policy)
            for policy in policies
            if cost.sparse_wins_from(setup.isa, policy, head_dim) is None and not keeps_all(policy)
        )
    )


def _brief(policy: Policy) -> str:
    fields = policy.model_dump(exclude={"selector"})
    return " ".join([policy.selector, *(f"{name}={value}" for name, value in fields.items())])


_said: set[str] = set()


def _say(level: int, line: str) -> None:
    if line not in _said:
        _said.add(line)
        logger.log(level, line)
