"""The kind of machine whose costs decide: an instruction set of CPUs, or a GPU's architecture.

Costs of CPUs rest on rates that were measured (`ops.cpu.cost`), those of GPUs are predicted and
were never timed on hardware (`ops.triton.cost`). What the other modules ask of either is here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from vllm_sparse_backend import compat
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.ops.cpu import cost as cpu
from vllm_sparse_backend.ops.triton import cost as gpu
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import AnyPolicy, Dense, keeps_all

CHUNK_TOKENS = 2048  # of a step: vLLM's default for a server on CPUs


class Target(Protocol):
    """What attention costs there, in seconds. Arguments are those of `ops.cpu.cost`."""

    @property
    def name(self) -> str:
        """The instruction set or the architecture."""

    @property
    def base(self) -> str:
        """What dense attention is."""

    @property
    def whose(self) -> str:
        """Whose seconds they are, and how they are known."""

    @property
    def chunk_tokens(self) -> int:
        """Of a step, as a server has them unless told otherwise."""

    @property
    def ends(self) -> tuple[Target, ...]:
        """The ends of a prediction that is a range, the worse one last, which is this; or this."""

    @property
    def call_seconds(self) -> float:
        """What a call of our core costs however short."""

    def base_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        """Of dense attention."""

    def attend_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        """Of our core with every tile kept, its call included."""

    def selection_seconds(
        self,
        policy: AnyPolicy,
        rows: int,
        context: int,
        heads: int,
        head_dim: int,
        prompt: int | None = None,
    ) -> float:
        """Of choosing tiles."""

    def sparse_seconds(
        self,
        policy: AnyPolicy,
        rows: int,
        context: int,
        heads: int,
        head_dim: int,
        density: float,
        prompt: int | None = None,
    ) -> float:
        """Of choosing tiles and attending to them, without the call."""

    def short_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        """Of a step of a prompt that is too short to be sparse, as a server computes it."""

    def follows(self, policy: AnyPolicy, context: int, head_dim: int) -> bool:
        """Whether a server follows a policy in a step of a prompt that is long enough."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """An instruction set; seconds of one thread. What is said of `Target` holds."""

    name: str

    @property
    def base(self) -> str:
        return "CPU_ATTN"

    @property
    def whose(self) -> str:
        return f"one thread with {self.name}"

    @property
    def chunk_tokens(self) -> int:
        return CHUNK_TOKENS

    @property
    def ends(self) -> tuple[Target, ...]:
        return (self,)

    @property
    def call_seconds(self) -> float:
        return cpu.RATES[self.name].call_seconds

    def base_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        return cpu.base_seconds(self.name, rows, context, heads, head_dim)

    def attend_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        return cpu.attend_seconds(self.name, rows, context, heads, head_dim)

    def selection_seconds(
        self,
        policy: AnyPolicy,
        rows: int,
        context: int,
        heads: int,
        head_dim: int,
        prompt: int | None = None,
    ) -> float:
        return cpu.selection_seconds(self.name, policy, rows, context, heads, head_dim, prompt)

    def sparse_seconds(
        self,
        policy: AnyPolicy,
        rows: int,
        context: int,
        heads: int,
        head_dim: int,
        density: float,
        prompt: int | None = None,
    ) -> float:
        its = rows, context, heads, head_dim
        return cpu.sparse_seconds(self.name, policy, *its, density, prompt)

    def short_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        """The faster of the core and CPU_ATTN."""
        its = rows, context, heads, head_dim
        return min(self.attend_seconds(*its), self.base_seconds(*its))

    def follows(self, policy: AnyPolicy, context: int, head_dim: int) -> bool:
        """From the context on where that pays."""
        wins = cpu.sparse_wins_from(self.name, policy, head_dim)
        return wins is not None and context >= wins


@dataclass(frozen=True, slots=True)
class Gpu:
    """An architecture, by a GPU of it, for a model with so many q heads to a kv head; bfloat16 or
    float16. Seconds of the whole GPU, PREDICTED and never timed. What is said of `Target` holds."""

    name: str
    group: int
    chunk: int | None = None  # tokens of a step, each of which codes all keys anew; None: vLLM's
    end: int = gpu.WORSE

    @property
    def base(self) -> str:
        return gpu.rates()[self.name].dense

    @property
    def whose(self) -> str:
        its = gpu.rates()[self.name]
        return f"one {its.gpu} ({self.name}), PREDICTED and never timed on hardware"

    @property
    def chunk_tokens(self) -> int:
        return self.chunk or gpu.rates()[self.name].chunk

    @property
    def ends(self) -> tuple[Target, ...]:
        return (replace(self, end=gpu.BETTER), replace(self, end=gpu.WORSE))

    @property
    def call_seconds(self) -> float:
        """Unknown, and left out."""
        return 0.0

    def base_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        return gpu.dense_seconds(self.name, rows, context, heads, head_dim)

    def attend_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        return gpu.attend_seconds(self.name, self.end, rows, context, heads, head_dim)

    def selection_seconds(
        self,
        policy: AnyPolicy,
        rows: int,
        context: int,
        heads: int,
        head_dim: int,
        prompt: int | None = None,
    ) -> float:
        its = rows, context, heads, head_dim, self.group, self.chunk_tokens, prompt
        return gpu.selection_seconds(self.name, self.end, policy, *its)

    def sparse_seconds(
        self,
        policy: AnyPolicy,
        rows: int,
        context: int,
        heads: int,
        head_dim: int,
        density: float,
        prompt: int | None = None,
    ) -> float:
        its = rows, context, heads, head_dim
        return density * self.attend_seconds(*its) + self.selection_seconds(policy, *its, prompt)

    def short_seconds(self, rows: int, context: int, heads: int, head_dim: int) -> float:
        """The base backend's."""
        return self.base_seconds(rows, context, heads, head_dim)

    def follows(self, policy: AnyPolicy, context: int, head_dim: int) -> bool:
        """Always: servers on GPUs decide by no cost model."""
        return not (isinstance(policy, Dense) or keeps_all(policy))


def names() -> list[str]:
    """What a `--target` can be: instruction sets, then architectures."""
    return [*cpu.RATES, *gpu.rates()]


def check(name: str | None) -> None:
    """Raise Refused for a name that there are no costs of; None is this machine's."""
    if name is not None and name not in names():
        raise Refused(f"--target: want one of {', '.join(names())}, got {name!r}")


def is_gpu(name: str) -> bool:
    """Whether a name of `names` is an architecture's."""
    return name in gpu.rates()


def of(name: str | None, facts: ModelFacts, chunk_tokens: int | None = None) -> Target:
    """The target of that name for such a model, or, for None, this machine; ``chunk_tokens``: where
    they are not vLLM's own. Raises Refused for one that nothing is known of, and SparsePrefillError
    where the compiled core would have to say what this machine is, and cannot run."""
    check(name)
    name = name or here()
    if is_gpu(name):
        return Gpu(name, facts.num_heads // facts.num_kv_heads, chunk_tokens)
    return Cpu(name)


def here() -> str:
    """What computes in this process: the GPU where vLLM runs on one, else the CPU. Raises as
    `of`."""
    platform = compat.supported_platform()
    if platform == "cpu":
        from vllm_sparse_backend.ops.cpu import core

        try:
            return core.active_isa()
        except core.CoreUnavailable as error:
            raise SparsePrefillError(str(error)) from None
    device, capability = compat.gpu()
    arch = f"sm_{capability.replace('.', '')}"
    if platform != "cuda" or not is_gpu(arch):
        raise Refused(
            f"--target: this machine's {device} (capability {capability}, {platform}) is none that "
            f"costs are known of; want one that is to stand for it, of {', '.join(names())}"
        )
    return arch


def why_untimed(name: str) -> str | None:
    """Why what list selectors take cannot be told for a target; None: it can be measured here, by
    the compiled core."""
    if is_gpu(name):
        return f"nothing is known of the time that list selectors take on {name}"
    try:
        own = here()
    except SparsePrefillError as error:
        return f"the time that list selectors take is measured, which cannot be done here: {error}"
    if own != name:
        return (
            f"the time that list selectors take is measured, and this machine is {own}, not {name}"
        )
    return None
