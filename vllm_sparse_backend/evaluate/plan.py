"""What an evaluation will run, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparse_backend.config import SECTION, SparseConfig, load_config
from vllm_sparse_backend.demo.plan import LARGE_VOCABULARY, Facts, LengthRefused, served_name
from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.evaluate.readings import ANSWER_TOKENS, RESERVE
from vllm_sparse_backend.offline import EngineOptions, kv_gib
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.tasks.catalog import Batch, Task, make_batches
from vllm_sparse_backend.tasks.stream import TokenStream

LENGTHS = (4096, 8192, 16384, 32768)
SPARE = 1.25  # of the KV cache: whole blocks, and those of the request before
SHORTEST = 512  # ten needles, and as much text around them


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...] | None  # None: those of `LENGTHS` that the model takes
    documents: int  # of a task and length
    seed: int
    dtype: str
    chunk_tokens: int | None
    hf_overrides: dict[str, Any] | None
    sparse_config: dict[str, Any]  # the section sparse_prefill


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    model: str
    name: str  # as shown
    options: EngineOptions
    config: SparseConfig
    sparse_config: dict[str, Any]
    wanted: Wanted
    lengths: tuple[int, ...]
    batches: tuple[tuple[int, Batch], ...]  # each with its length
    texts: tuple[str, ...]  # what was read, by name


def make_plan(model: Path, facts: Facts, streams: Sequence[TokenStream], wanted: Wanted) -> Plan:
    """All documents of all tasks and lengths.

    Raises `LengthRefused`, ConfigError for a wrong configuration and TextError for a text that is
    too short.
    """
    config = load_config({SECTION: wanted.sparse_config})
    name = served_name(model)
    positions = int((wanted.hf_overrides or {}).get("max_position_embeddings", facts.max_positions))
    lengths = wanted.lengths or tuple(length for length in LENGTHS if length <= positions)
    lengths = tuple(sorted(set(lengths or (positions,))))
    for length in lengths:
        if length < SHORTEST:
            raise LengthRefused(f"length {length}: want at least {SHORTEST} tokens")
        if length > positions:
            raise LengthRefused(
                f"length {length}: {name} has {positions} positions; scaling its RoPE takes "
                '--hf-overrides \'{"rope_parameters": {...}, "max_position_embeddings": N}\''
            )
    # Log probabilities take chunk x vocabulary x 4 bytes, several times over.
    chunk = wanted.chunk_tokens or (1024 if facts.vocabulary > LARGE_VOCABULARY else 2048)
    batches = [
        (length, batch)
        for task in wanted.tasks
        for length in lengths
        for batch in make_batches(streams, task, length - RESERVE, wanted.documents, wanted.seed)
    ]
    for _, batch in batches:
        _check_room(batch)
    return Plan(
        model=str(model),
        name=name,
        options=EngineOptions(
            model=str(model),
            max_model_len=max(lengths),
            chunk_tokens=chunk,
            dtype=wanted.dtype,
            hf_overrides=wanted.hf_overrides,
            kv_gib=_kv_gib(model, max(lengths), wanted.dtype),
            prefix_caching=True,  # of the questions of one document; a salt keeps documents apart
        ),
        config=config,
        sparse_config=wanted.sparse_config,
        wanted=wanted,
        lengths=lengths,
        batches=tuple(batches),
        texts=tuple(text for stream in streams for text in stream.source.read),
    )


def _kv_gib(model: Path, tokens: int, dtype: str) -> int:
    """GiB of KV cache for one request of so many tokens in every layer, and some to spare."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    queries = config.num_attention_heads
    sizes = ModelFacts(
        architecture=config.model_type,
        num_layers=config.num_hidden_layers,
        num_heads=queries,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or queries,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // queries,
    )
    return kv_gib(sizes, round(SPARE * tokens), dtype)


def _check_room(batch: Batch) -> None:
    """A tokenizer may need more tokens for a question than the usual ones do."""
    asked = (question for item in batch.items for question in item.questions)
    longest = max((len(question.token_ids) for question in asked), default=0) + ANSWER_TOKENS
    if longest > RESERVE:
        raise TextError(
            f"{batch.task}: want at most {RESERVE} tokens for a question with its answer, "
            f"got {longest} with this model's tokenizer"
        )
