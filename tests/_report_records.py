"""A profile, its measurement and an evaluation that never took place, for tests of pictures."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

from vllm_sparse_backend.calibrate.results import (
    Curve,
    Figures,
    HeadResult,
    Measurement,
    Point,
    Predicted,
)
from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.evaluate.results import (
    Agreement,
    Answer,
    Bucket,
    Cell,
    Continuation,
    DocumentLoss,
    Evaluation,
    Interval,
    Likelihood,
    Retrieval,
    Row,
)
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.selection import DENSE, AnyPolicy, Mass, Sale, Static

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64
)
POLICIES: list[list[AnyPolicy]] = [
    [DENSE] * 4,
    [Mass(tau=0.001), Mass(tau=0.01), Sale(tau=0.002), Static(local=512)],
    [Mass(tau=0.01), Mass(tau=0.05), Static(local=1024), Sale(tau=0.008)],
    [Mass(tau=0.01), Mass(tau=0.01), Mass(tau=0.01), DENSE],
]
LENGTHS = [2048, 8192]


def profile(name: str = "made-up", facts: ModelFacts = FACTS) -> Profile:
    """Of `POLICIES`, as far as the model has layers."""
    policies = {
        layer: dict(enumerate(row)) for layer, row in enumerate(POLICIES[: facts.num_layers])
    }
    return Profile.build(facts, policies, name=name)


def figures(density: float) -> Figures:
    """The less is computed, the worse."""
    lost = 1 - density
    return Figures(density=density, error=0.1 * lost**2, tail=0.4 * lost, recall=1 - 0.1 * lost)


def measurement(of: Profile) -> Measurement:
    """Every head of layers from 1 on; densities fall with the threshold and the length."""
    heads = [
        HeadResult(
            layer=layer,
            head=head,
            policy=policy,
            figures={
                length: figures(
                    1.0 if policy == DENSE else (0.5 - 0.05 * layer - 0.02 * head) / (1 + at)
                )
                for at, length in enumerate(LENGTHS)
            },
        )
        for layer in range(1, of.model.num_layers)
        for head, policy in enumerate(of.for_layer(layer))
    ]
    curves = [
        Curve(
            selector=selector,
            length=length,
            points=[
                Point(tau=tau, figures=figures(0.8 + 0.15 * at - 0.1 * math.log2(tau / 1e-3)))
                for tau in (1e-3, 4e-3, 16e-3, 64e-3)
            ],
        )
        for at, selector in enumerate(("mass", "sale"))
        for length in LENGTHS
    ]
    return Measurement(
        name=of.name,
        digest=of.digest,
        model=of.model,
        texts=["a book", "some <code>"],
        lengths=LENGTHS,
        chunk_tokens=2048,
        rule="head",
        budget=0.05,
        seed=7,
        isa="avx2",
        dtype="float32",
        sparse_layers=list(range(1, of.model.num_layers)),
        heads=heads,
        curves=curves,
        predicted={
            length: Predicted(
                base=4e-7 * length**2, keep_all=2e-7 * length**2, sparse=8e-8 * length**2
            )
            for length in LENGTHS
        },
        seconds=1234.0,
    )


def save_both(folder: Path, of: Profile) -> Path:
    """The profile's file, its measurement beside it."""
    path = folder / "made-up.json"
    of.save(path)
    beside = folder / "made-up.measurement.json"
    beside.write_text(measurement(of).model_dump_json(), encoding="utf-8")
    return path


def retrieval(lost: int = 0, answer: str = " 12345.") -> Retrieval:
    """Three depths of four questions; dense misses one, sparse that and `lost` more."""
    cells = tuple(
        Cell(
            depth=depth,
            asked=4,
            dense_right=4 - (depth == 0.5),
            sparse_right=4 - (depth == 0.5) - (lost if depth == 0.1 else 0),
        )
        for depth in (0.1, 0.5, 0.9)
    )
    answers = tuple(
        Answer(
            document=number, name="door code", expected="12345", depth=0.1, cold=True,
            dense=" 12345.", sparse=answer, dense_right=True, sparse_right=number >= lost,
        )
        for number in range(11)
    )  # fmt: skip
    return Retrieval(
        asked=12,
        dense_right=11,
        sparse_right=11 - lost,
        both=11 - lost,
        lost=lost,
        gained=0,
        retained=(11 - lost) / 11,
        retained_interval=Interval(low=0.741, high=1.0),
        depths=cells,
        answers=answers,
    )


def likelihood(change: float = 0.2) -> Likelihood:
    """Two documents, four buckets; sparse is worse by `change` percent."""
    worse = 1 + change / 100
    return Likelihood(
        tokens=2000,
        dense_perplexity=10.0,
        sparse_perplexity=10.0 * worse,
        change_percent=change,
        error_percent=0.05,
        change_interval=Interval(low=change - 0.1, high=change + 0.1),
        worst_nats=0.31,
        documents=(DocumentLoss(document=0, tokens=2000, dense_nats=4605.0, sparse_nats=4609.0),),
        buckets=tuple(
            Bucket(
                first=at * 2048,
                last=at * 2048 + 2047,
                tokens=500,
                dense_perplexity=12.0 - at,
                sparse_perplexity=(12.0 - at) * worse,
            )
            for at in range(4)
        ),
    )


def evaluation(of: Profile, lost: int = 0, change: float = 0.2, **more: object) -> Evaluation:
    """Needles at both lengths, a text's perplexity, and continuations."""
    needles = [
        Row(
            task="needles", text="", length=length, documents=4, retrieval=retrieval(lost),
            density=0.3 / (1 + at), sparse_share=0.95,
            dense_ttft=(4.0 * length / 2048, 5.0 * length / 2048),
            sparse_ttft=(2.0 * length / 2048, 2.5 * length / 2048),
        )
        for at, length in enumerate(LENGTHS)
    ]  # fmt: skip
    text = Row(
        task="text", text="code", length=8192, documents=2, likelihood=likelihood(change),
        density=0.2, sparse_share=0.95,
    )  # fmt: skip
    greedy = Row(
        task="continue", text="docs", length=8192, documents=2, density=None, sparse_share=0.0,
        agreement=Agreement(
            continuations=2, identical=1, agreed_share=0.75,
            documents=(Continuation(document=0, tokens=64, agreed=64),),
        ),
    )  # fmt: skip
    fields: dict[str, object] = {
        "made_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        "model": "a-model",
        "facts": of.model,
        "dtype": "float32",
        "threads": 2,
        "chunk_tokens": 2048,
        "hf_overrides": None,
        "machine": this_machine(),
        "isa": "avx2",
        "profile": of.name,
        "profile_digest": of.digest,
        "policies": "profile made-up",
        "sparse_config": {},
        "texts": ("a book",),
        "tasks": ("needles", "text", "continue"),
        "lengths": tuple(LENGTHS),
        "seed": 3,
        "repeat": "vllm-sparse eval a-model --profile made-up.json",
        "rows": (*needles, text, greedy),
        "seconds": 600.0,
    }
    return Evaluation.model_validate(fields | more)
