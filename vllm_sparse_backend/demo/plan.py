"""What the demo will run: which lengths on which server, how many documents of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sparse_backend.config import SECTION, SparseConfig, load_config
from vllm_sparse_backend.demo.model import NAME, ModelUnavailable
from vllm_sparse_backend.demo.serve import ServerOptions
from vllm_sparse_backend.errors import SparsePrefillError

LENGTHS = (1024, 4096, 8192, 16384)
QUICK_LENGTHS = (4096,)
RESERVE = 48  # tokens of a length that are left to the question and its answer
SHORTEST = 512  # three needles, and text around them
DEPTHS = (0.1, 0.5, 0.9)
LARGE_VOCABULARY = 100_000
# Twice the length SmolLM2 was trained for. vLLM scales nothing without max_trained_positions;
# beyond factor 2 the model finds no needle at all, whatever the attention.
SCALED_POSITIONS = 16384
SCALING: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "dynamic",
        "rope_theta": 100000.0,
        "factor": 2.0,
        "max_trained_positions": 8192,
    },
    "max_position_embeddings": SCALED_POSITIONS,
}


class LengthRefused(SparsePrefillError):
    """The model cannot be asked at this length; the message says why and what would do."""


@dataclass(frozen=True)
class Facts:
    """What the demo has to know of a model beforehand."""

    max_positions: int
    vocabulary: int
    scalable: bool  # the packaged model, whose scaling is known to work


@dataclass(frozen=True)
class Setup:
    """One configuration of the server, started dense and then sparse."""

    lengths: tuple[int, ...]
    options: ServerOptions
    scaled: bool


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    model: Path
    setups: tuple[Setup, ...]
    quick: bool = False
    config: SparseConfig = field(default_factory=SparseConfig)

    def documents(self, length: int) -> int:
        """How many documents of a length: fewer where each takes long."""
        if self.quick:
            return 1
        return 3 if length <= 8192 else 2

    def is_sparse(self, prompt_tokens: int) -> bool:
        """Whether any step of a cold prefill of so many tokens ought to run sparsely."""
        chunk, config = self.setups[0].options.chunk_tokens, self.config
        return config.enabled and any(
            end >= config.min_prompt_tokens and end - start >= config.min_query_tokens
            for start in range(0, prompt_tokens, chunk)
            for end in [min(start + chunk, prompt_tokens)]
        )


def read_facts(model: Path, packaged: bool) -> Facts:
    """From the model's config. Raises `ModelUnavailable` if it cannot be read."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model).get_text_config()
        return Facts(
            max_positions=int(config.max_position_embeddings),
            vocabulary=int(config.vocab_size),
            scalable=packaged,
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelUnavailable(f"{model}: its configuration cannot be read: {error}") from error


def make_plan(
    model: Path,
    facts: Facts,
    *,
    lengths: Sequence[int],
    threads: int,
    chunk_tokens: int | None = None,
    sparse_config: dict[str, Any] | None = None,
    hf_overrides: dict[str, Any] | None = None,
    quick: bool = False,
    dtype: str = "bfloat16",
) -> Plan:
    """Lengths grouped by the server they need.

    `hf_overrides` are used for all lengths and may raise `max_position_embeddings`. `quick`
    servers start without compiling the model, which vLLM does by default. Raises `LengthRefused`,
    and ConfigError for a wrong `sparse_config`.
    """
    sparse_config = sparse_config or {}
    config = load_config({SECTION: sparse_config})
    native = int((hf_overrides or {}).get("max_position_embeddings", facts.max_positions))
    scalable = facts.scalable and hf_overrides is None
    limit = SCALED_POSITIONS if scalable else native
    wanted = sorted(set(lengths))
    for length in wanted:
        if length < SHORTEST:
            raise LengthRefused(f"length {length}: want at least {SHORTEST} tokens")
        if length > limit:
            raise LengthRefused(f"length {length}: {_why_too_long(model, native, scalable)}")
    # Log probabilities take chunk x vocabulary x 4 bytes, several times over.
    chunk = chunk_tokens or (1024 if facts.vocabulary > LARGE_VOCABULARY else 2048)

    def setup(chosen: list[int], overrides: dict[str, Any] | None, scaled: bool) -> Setup:
        options = ServerOptions(
            model=str(model),
            served_name=served_name(model),
            max_model_len=max(chosen),
            threads=threads,
            chunk_tokens=chunk,
            hf_overrides=overrides,
            sparse_config=sparse_config,
            dtype=dtype,
            eager=quick,
        )
        return Setup(tuple(chosen), options, scaled)

    near = [length for length in wanted if length <= native]
    far = [length for length in wanted if length > native]
    setups = [setup(near, hf_overrides, scaled=False)] if near else []
    setups += [setup(far, SCALING, scaled=True)] if far else []
    return Plan(model=model, setups=tuple(setups), quick=quick, config=config)


def default_lengths(facts: Facts, positions: int, quick: bool) -> list[int]:
    """Those of `LENGTHS` (or `QUICK_LENGTHS`) that the model takes."""
    limit = max(positions, SCALED_POSITIONS) if facts.scalable else positions
    lengths = [length for length in (QUICK_LENGTHS if quick else LENGTHS) if length <= limit]
    return lengths or [positions]


def served_name(model: Path) -> str:
    """What the server calls the model: the last part of its name or path."""
    return model.name or NAME


def _why_too_long(model: Path, positions: int, scalable: bool) -> str:
    if scalable:
        return (
            f"{served_name(model)} has {positions} positions, and up to {SCALED_POSITIONS} with "
            "RoPE scaling; beyond that it finds nothing"
        )
    return (
        f"{served_name(model)} has {positions} positions; scaling its RoPE takes "
        '--hf-overrides \'{"rope_parameters": {...}, "max_position_embeddings": N}\''
    )
