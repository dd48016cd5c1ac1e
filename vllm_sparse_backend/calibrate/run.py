"""Calibrates: reads documents through vLLM, tabulates, chooses, writes.

The engine keeps every tile, so that what a layer is measured on is what dense attention passes on,
as in SALE. ``as_served`` measures once more behind the profile that this gave: a layer then gets
what a server's would, the errors of all layers before it included.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import get_num_threads

from vllm_sparse_backend import __version__
from vllm_sparse_backend.calibrate.candidates import FUSED, LADDERS, Ladder
from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.measure import BY_LADDER, sampled
from vllm_sparse_backend.calibrate.parts import SENSITIVITY, PartsFolder
from vllm_sparse_backend.calibrate.record import Recorder
from vllm_sparse_backend.calibrate.results import Measurement, measurement_of, parts_of
from vllm_sparse_backend.calibrate.rules import Choice, Rule, choose
from vllm_sparse_backend.calibrate.sources import core_digest, digest, made_of
from vllm_sparse_backend.calibrate.summary import choosing, profile_of, summary_of
from vllm_sparse_backend.calibrate.table import Floats, Part, Table, relative_cost, tabulate
from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.files import write_whole
from vllm_sparse_backend.offline import EngineOptions, engine
from vllm_sparse_backend.ops.cpu import core
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.selection import DENSE
from vllm_sparse_backend.target import Target
from vllm_sparse_backend.tasks.catalog import Task

DENSE_CONFIG: dict[str, Any] = {"policy": DENSE.model_dump()}


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    options: EngineOptions
    name: str
    texts: tuple[str, ...]  # what was read, by name
    lengths: tuple[int, ...]
    rule: Rule
    budget: float
    tail: float
    blocks: int  # q blocks measured of a document, in every layer and head
    seed: int
    output: Path
    target: Target  # whose costs decide
    as_served: bool = False
    methods: tuple[str, ...] = FUSED  # selectors that heads may get
    ladders: tuple[Ladder, ...] = LADDERS  # `ladders_of` these


@dataclass(frozen=True)
class Model:
    """What has to be known of it beforehand."""

    facts: ModelFacts
    sparse_layers: tuple[int, ...]


class Progress:
    """Told how far it is; a screen's or nobody's."""

    def document(self, name: str, steps: int, reused: bool) -> None:
        """One begins, of so many layers times chunks, or was finished by an earlier run."""

    def advance(self) -> None:
        """A layer of a chunk is done. Chunks that are too short to be sparse are not seen."""

    def finished(self) -> None:
        """The document that began is done."""


def look_at(model: str, dtype: str = "auto", hf_overrides: dict[str, Any] | None = None) -> Model:
    """The model's facts and which layers can be sparse, as it is to be read.

    Raises SparsePrefillError if vLLM cannot serve it, or if no layer can be sparse.
    """
    from vllm_sparse_backend.backend import expect, start
    from vllm_sparse_backend.doctor import configuration, quiet

    with quiet():
        options = ["--enforce-eager", "--dtype", dtype]
        if hf_overrides:
            options += ["--hf-overrides", json.dumps(hf_overrides)]
        vllm_config = configuration(model, options=options)
        facts = start.facts_of(vllm_config.model_config)
        reasons = expect.reasons(vllm_config, start.capabilities())
    sparse = tuple(layer for layer, reason in enumerate(reasons) if reason is None)
    if not sparse:
        counted = ", ".join(f"{reason} ({n})" for reason, n in Counter(reasons).items())
        raise SparsePrefillError(
            f"model {model}: want layers that can be sparse, got none: {counted}"
        )
    return Model(facts, sparse)


def calibrate(
    wanted: Wanted, model: Model, documents: Sequence[Document], progress: Progress
) -> tuple[Profile, Measurement]:
    """Measure, choose, and write the profile with its measurement beside it.

    What is measured stays in the folder that `parts_of` names, for a calibration that was cut off
    as for another rule or budget. Raises SparsePrefillError.
    """
    started = time.perf_counter()
    folder = PartsFolder(parts_of(wanted.output))
    sensitivity = None
    if wanted.rule is Rule.LOSS:
        sensitivity = _sensitivity(wanted, model, documents, progress, folder)

    def chosen_behind(
        served: dict[str, Any], followed: str
    ) -> tuple[Profile, Table, Choice, dict[str, float]]:
        parts = _parts(wanted, model, documents, progress, folder, served, followed)
        table = tabulate(parts, wanted.ladders)
        cost = relative_cost(table, wanted.target, model.facts.head_dim, wanted.methods)
        choice = choose(table, cost, wanted.rule, wanted.budget, wanted.tail, sensitivity)
        took = choosing(parts, table, choice)
        profile = profile_of(wanted, model, table, choice, took)
        _write(wanted.output, profile)
        return profile, table, choice, took

    profile, table, choice, took = chosen_behind(DENSE_CONFIG, "dense")
    if wanted.as_served:
        itself = {"profile": str(wanted.output.resolve())}
        profile, table, choice, took = chosen_behind(itself, profile.digest)
    seconds = time.perf_counter() - started
    measurement = summary_of(wanted, model, profile, table, choice, seconds, took, sensitivity)
    text = measurement.model_dump_json(indent=1) + "\n"
    write_whole(measurement_of(wanted.output), text, _stays(wanted.output))
    return profile, measurement


def _sensitivity(
    wanted: Wanted,
    model: Model,
    documents: Sequence[Document],
    progress: Progress,
    folder: PartsFolder,
) -> Floats:
    """Of the heads that can be sparse [L, H], measured now or by an earlier run."""
    from vllm_sparse_backend.calibrate.sensitivity import TOKENS, sensitivities

    options = wanted.options
    ids = next(its.token_ids for its in documents if its.group.kind == Task.TEXT)[:TOKENS]
    key = digest([__version__, options.identity(), model.sparse_layers, wanted.seed, ids])
    found = folder.load_sensitivity(key)
    progress.document(SENSITIVITY, 1, reused=found is not None)
    if found is None:
        found = sensitivities(
            options.model, model.facts, model.sparse_layers, ids, options.hf_overrides, wanted.seed
        )
        folder.save_sensitivity(key, found)
        progress.advance()
        progress.finished()
    return found


def _parts(
    wanted: Wanted,
    model: Model,
    documents: Sequence[Document],
    progress: Progress,
    folder: PartsFolder,
    served: dict[str, Any],
    followed: str,
) -> list[Part]:
    """Every document's, those of an earlier run or from one engine that is started for the rest."""
    keys = {document.name: _key(wanted, model, document, followed) for document in documents}
    prefix = "" if followed == "dense" else "served-"
    parts = {
        document.name: folder.load(prefix + document.name, keys[document.name], document.group)
        for document in documents
    }

    def steps(document: Document) -> int:
        chunks = -(-len(document.token_ids) // wanted.options.chunk_tokens)
        return chunks * len(model.sparse_layers)

    for document in documents:
        if parts[document.name] is not None:
            progress.document(document.name, steps(document), reused=True)
    missing = [document for document in documents if parts[document.name] is None]
    if missing:
        with engine(wanted.options, "sparse_prefill", served) as llm:
            for document in missing:
                progress.document(document.name, steps(document), reused=False)
                part = _read(llm, wanted, model, document, progress.advance)
                folder.save(prefix + document.name, keys[document.name], part)
                progress.finished()
                parts[document.name] = part
    return [part for part in parts.values() if part is not None]


def _read(
    llm: Any,
    wanted: Wanted,
    model: Model,
    document: Document,
    advance: Callable[[], None],
) -> Part:
    from vllm import SamplingParams

    from vllm_sparse_backend.backend.observe import observing

    recorder = Recorder(
        document.group,
        SparseConfig(),
        _starts(wanted, document),
        len(document.token_ids),
        advance,
        wanted.ladders,
    )
    prompt: Any = {"prompt_token_ids": list(document.token_ids)}
    with observing(recorder):
        llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    if recorder.layers() != list(model.sparse_layers):
        raise SparsePrefillError(
            f"model {wanted.options.model}: its configuration says that the layers "
            f"{list(model.sparse_layers)} can be sparse, {recorder.layers()} were"
        )
    return recorder.part()


def _starts(wanted: Wanted, document: Document) -> list[int]:
    """Where the q blocks start that are measured of a document. A last step that is too short to
    be sparse has none: the last block before it is the last."""
    length = len(document.token_ids)
    rest = length % wanted.options.chunk_tokens
    short = rest if rest < min(length, SparseConfig().min_query_tokens) else 0
    return sampled(length - short, wanted.blocks, f"{wanted.seed} {document.name}")


def _key(wanted: Wanted, model: Model, document: Document, followed: str) -> str:
    """Of all that a document's measurement depends on."""
    decides: dict[str, Any] = {
        "version": __version__,
        "model": model.facts.model_dump(),
        "served": [wanted.options.identity(), followed],
        "figures": BY_LADDER,
        "ladders": [
            [its.model_dump(mode="json") for its in ladder.settings] for ladder in wanted.ladders
        ],
        "measured": _starts(wanted, document),
        "tokens": document.token_ids,
    }
    listed = [policy for ladder in wanted.ladders if ladder.listed for policy in ladder.settings]
    if listed:  # their times are measured, too, by the core and the threads that there are
        its = [made_of(listed), core_digest(), core.active_isa(), get_num_threads()]
        decides["listed"] = its
    return digest(decides)


def _write(path: Path, profile: Profile) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.save(path)
    except OSError as error:
        raise SparsePrefillError(
            f"{path}: cannot be written ({error.strerror}){_stays(path)}"
        ) from error


def _stays(output: Path) -> str:
    return (
        f"; the finished documents stay in {parts_of(output)}, and the same command goes on from "
        "there"
    )
