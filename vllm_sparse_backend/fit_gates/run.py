"""Reads documents through vLLM, teaches every layer's gates, writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel

from vllm_sparse_backend import __version__
from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.run import DENSE_CONFIG, Model
from vllm_sparse_backend.compat_rotary import rotations
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.fit_gates.fit import divergence, taught, untaught
from vllm_sparse_backend.fit_gates.lessons import Lesson, Teacher
from vllm_sparse_backend.offline import EngineOptions, engine, refuse_lone_row
from vllm_sparse_backend.selection import gates
from vllm_sparse_backend.selection.gates import Gates, Rotation

Advance = Callable[[], None]
# Every step is to be seen, and what a layer attends with is to be what dense layers pass on.
SEEN: dict[str, Any] = {**DENSE_CONFIG, "min_prompt_tokens": 1, "min_query_tokens": 1}


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    options: EngineOptions
    texts: tuple[str, ...]  # what was read, by name
    length: int
    steps: int
    seed: int
    output: Path


class LayerResult(BaseModel):
    """Nats from a layer's attention to its gates' softmax, the mean over heads."""

    layer: int
    untaught: float  # of mean queries with mean keys, on the document that was kept aside
    taught: float  # on the same
    learned_from: float  # on those it was taught with


class Summary(BaseModel):
    """What came of it."""

    output: str
    digest: str  # of the file
    model: str
    texts: list[str]
    length: int
    documents: int  # taught with; one more was kept aside
    steps: int
    seed: int
    heads: int  # of a layer
    untaught: float  # these two are means over layers
    taught: float
    seconds: float
    layers: list[LayerResult]


def fit(wanted: Wanted, model: Model, documents: Sequence[Document], advance: Advance) -> Summary:
    """Teach with all documents but the last, judge by that one, write the gates.

    ``advance`` is called `work` times. Raises SparsePrefillError.
    """
    started = time.perf_counter()
    turned, lessons = _lessons(wanted, model, documents, advance)
    made: dict[int, Gates] = {}
    results: list[LayerResult] = []
    for layer in model.sparse_layers:
        # Taken out, so that what has been learned from is free.
        *own, aside = [lessons_of.pop(layer) for lessons_of in lessons]
        heads, _, dim = aside.queries.shape
        start = untaught(heads, dim, turned[layer])
        made[layer] = taught(start, own, wanted.steps, wanted.seed, advance)
        with torch.no_grad():
            results.append(
                LayerResult(
                    layer=layer,
                    untaught=float(divergence(start, [aside]).mean()),
                    taught=float(divergence(made[layer], [aside]).mean()),
                    learned_from=float(divergence(made[layer], own).mean()),
                )
            )
    facts = model.facts
    about = {
        "architecture": facts.architecture,
        "model_digest": facts.digest or "",
        "made_by": f"vllm-sparse-backend {__version__}",
        "seed": str(wanted.seed),
    }
    try:
        wanted.output.parent.mkdir(parents=True, exist_ok=True)
        digest = gates.save(wanted.output, made, about)
    except OSError as error:
        raise SparsePrefillError(f"{wanted.output}: cannot be written ({error.strerror})") from None
    return Summary(
        output=str(wanted.output),
        digest=digest,
        model=wanted.options.model,
        texts=list(wanted.texts),
        length=wanted.length,
        documents=len(documents) - 1,
        steps=wanted.steps,
        seed=wanted.seed,
        heads=facts.num_heads,
        untaught=fmean(its.untaught for its in results),
        taught=fmean(its.taught for its in results),
        seconds=time.perf_counter() - started,
        layers=results,
    )


def work(wanted: Wanted, model: Model, documents: Sequence[Document]) -> int:
    """How often `fit` advances."""
    chunks = sum(-(-len(its.token_ids) // wanted.options.chunk_tokens) for its in documents)
    return len(model.sparse_layers) * (chunks + wanted.steps)


def _lessons(
    wanted: Wanted, model: Model, documents: Sequence[Document], advance: Advance
) -> tuple[dict[int, Rotation], list[dict[int, Lesson]]]:
    """Each layer's RoPE, and of each document the lessons by layer."""
    from vllm import SamplingParams

    from vllm_sparse_backend.backend.observe import observing

    found = []
    for document in documents:
        refuse_lone_row(len(document.token_ids), wanted.options.chunk_tokens)
    with engine(wanted.options, "sparse_prefill", SEEN) as llm:
        (angles,) = llm.apply_model(rotations)
        none = torch.empty(0), False
        turned = {layer: Rotation(*angles.get(layer, none)) for layer in model.sparse_layers}
        for document in documents:
            teacher = Teacher(turned, advance)
            prompt: Any = {"prompt_token_ids": list(document.token_ids)}
            with observing(teacher):
                llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
            found.append(teacher.lessons())
    for lessons in found:
        if tuple(sorted(lessons)) != model.sparse_layers:
            raise SparsePrefillError(
                f"model {wanted.options.model}: its configuration says that the layers "
                f"{list(model.sparse_layers)} can be sparse, {sorted(lessons)} were"
            )
    return turned, found
