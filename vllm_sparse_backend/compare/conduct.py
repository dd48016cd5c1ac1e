"""A whole comparison: from what was asked for to what is written down."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_sparse_backend.calibrate.command import check_lengths
from vllm_sparse_backend.calibrate.documents import make_documents
from vllm_sparse_backend.calibrate.run import look_at
from vllm_sparse_backend.compare import end_to_end, methods
from vllm_sparse_backend.compare.measure import How
from vllm_sparse_backend.compare.results import Comparison
from vllm_sparse_backend.compare.run import Advance, Wanted, compare, rehearse_all
from vllm_sparse_backend.compare.store import Store
from vllm_sparse_backend.demo.machine import fast_dtype, gpu, this_machine
from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.plan import read_facts
from vllm_sparse_backend.demo.progress import note, warn_if_busy
from vllm_sparse_backend.offline import EngineOptions, kv_gib
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import ModelFacts, Profile, load_profile
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, AnyPolicy, label
from vllm_sparse_backend.tasks.catalog import Task
from vllm_sparse_backend.tasks.source import names_of, read_sources
from vllm_sparse_backend.tasks.stream import TokenStream

EVERY, FROM = 6, 2  # of the layers that can be sparse, unless layers are named
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    model: str
    text: tuple[Path, ...]
    methods: str
    policies: tuple[AnyPolicy, ...]
    profiles: tuple[Path, ...]
    lengths: tuple[int, ...]
    layers: str | None
    errors: tuple[float, ...]
    end_to_end: int
    end_to_end_length: int | None
    tasks: tuple[Task, ...]
    documents: int
    repeats: int
    blocks: int
    threads: int
    seed: int
    chunk_tokens: int | None
    dtype: str
    hf_overrides: dict[str, Any] | None
    parts: Path


def conduct(asked: Asked, repeat: str) -> Comparison:
    """Do what was asked for, but for what an earlier run has done of it; ``repeat``: the command to
    show for it. Raises SparsePrefillError."""
    profiles = _profiles(asked.profiles)
    chosen = methods.choose(asked.methods, asked.policies, [its for its, _ in profiles])
    model = ensure_model(asked.model)
    facts = read_facts(model, packaged=False)
    positions = (asked.hf_overrides or {}).get("max_position_embeddings", facts.max_positions)
    check_lengths(list(asked.lengths), positions)
    from transformers import AutoTokenizer

    sources = read_sources(asked.text)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    streams = [TokenStream(tokenizer, source) for source in sources]
    documents = make_documents(streams, [Task.TEXT], asked.lengths, 1, asked.seed)
    dtype = fast_dtype() if asked.dtype == "auto" else asked.dtype
    afterwards = end_to_end.EndToEnd(
        model=model,
        facts=facts,
        streams=streams,
        tasks=asked.tasks,
        length=asked.end_to_end_length or max(asked.lengths),
        documents=asked.documents,
        seed=asked.seed,
        dtype=dtype,
        chunk_tokens=asked.chunk_tokens,
        hf_overrides=asked.hf_overrides,
        repeat=repeat,
    )
    if asked.end_to_end:  # what will not do is to be known before hours of measuring
        end_to_end.plan_of(afterwards, {})
    look = look_at(str(model), dtype, asked.hf_overrides)
    for profile, _ in profiles:
        profile.match(look.facts)
    layers = layers_of(asked.layers, look.sparse_layers)
    rehearse_all(chosen, look.facts, layers)
    wanted = Wanted(
        options=_engine(asked, model, look.facts, dtype),
        model=look,
        layers=layers,
        documents=tuple(documents),
        methods=tuple(chosen.methods),
        how=How(asked.repeats, asked.blocks, asked.seed),
        threads=asked.threads,
    )
    if (device := gpu()) is not None:
        note(f"read on {device}; methods are timed on this machine's CPU, by the compiled core")
    for name, why in chosen.left_out.items():
        note(f"left out: {name}: {why}")
    warn_if_busy()
    store = Store(asked.parts)
    with _bar(wanted.work) as advance:
        found = compare(wanted, store, advance)
    results = found.methods
    if asked.end_to_end:
        results = end_to_end.evaluated(
            afterwards,
            chosen.methods,
            results,
            longest=max(asked.lengths),
            error=asked.errors[0],
            count=asked.end_to_end,
            files={methods.Setting(its).name: path for its, path in profiles},
            store=store,
            note=note,
        )
    return Comparison(
        made_at=datetime.now(UTC).replace(microsecond=0),
        model=model.name,
        facts=look.facts,
        layers=list(wanted.layers),
        sparse_layers=list(look.sparse_layers),
        dtype=dtype,
        isa=core.active_isa(),
        threads=asked.threads,
        machine=this_machine(),
        chunk_tokens=wanted.options.chunk_tokens,
        hf_overrides=asked.hf_overrides,
        texts=list(names_of(sources)),
        seed=asked.seed,
        repeats=asked.repeats,
        blocks=asked.blocks,
        lengths=wanted.lengths,
        errors=list(asked.errors),
        dense=found.dense,
        dense_seconds=found.dense_seconds,
        default=label(UNIFORM_DEFAULT),
        default_method=UNIFORM_DEFAULT.selector,
        methods=results,
        left_out=chosen.left_out,
        repeat=repeat,
        disturbed=found.disturbed,
    )


def layers_of(text: str | None, sparse: Sequence[int]) -> tuple[int, ...]:
    """The layers that an option's text names, of those that can be sparse. Raises Refused."""
    if text is None:
        return tuple(sparse[min(FROM, len(sparse) - 1) :: EVERY])
    if text == "all":
        return tuple(sparse)
    try:
        asked = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise Refused(f"--layers: want all, or numbers with commas between, got {text!r}") from None
    if wrong := [layer for layer in asked if layer not in sparse]:
        known = ", ".join(map(str, sparse))
        raise Refused(
            f"--layers: want some of the layers that can be sparse, {known}; got "
            + ", ".join(map(str, wrong))
        )
    return tuple(asked)


def _profiles(paths: Sequence[Path]) -> list[tuple[Profile, Path]]:
    """Raises ProfileError, and Refused if two have one name."""
    found: dict[str, tuple[Profile, Path]] = {}
    for path in paths:
        profile = load_profile(path)
        if profile.name in found:
            raise Refused(
                f"--profile {path}: want profiles of different names, got {profile.name!r} as in "
                f"{found[profile.name][1]}"
            )
        found[profile.name] = profile, path
    return list(found.values())


def _engine(asked: Asked, model: Path, facts: ModelFacts, dtype: str) -> EngineOptions:
    longest = max(asked.lengths)
    return EngineOptions(
        model=str(model),
        max_model_len=longest,
        chunk_tokens=asked.chunk_tokens or CHUNK_TOKENS,
        dtype=dtype,
        hf_overrides=asked.hf_overrides,
        kv_gib=kv_gib(facts, longest, dtype),
    )


@contextmanager
def _bar(work: float) -> Iterator[Advance]:
    """On stderr. A part's share grows with the square of its length, as its time does."""
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=work, desc="compare", bar_format=form, file=sys.stderr) as bar:

        def advance(what: str, done: float) -> None:
            if what:
                bar.set_description_str(what)
            bar.update(done)

        yield advance
