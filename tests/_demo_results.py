"""A run of the demo that never took place, for the tests of what is said about one."""

from __future__ import annotations

from datetime import UTC, datetime

from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.demo.results import (
    Answer,
    DocumentRun,
    Loss,
    Results,
    Row,
    ServerRun,
    SideRow,
)


def answer(text: str = " 12345. Remember it.", right: bool = True) -> Answer:
    return Answer(name="door code", expected="12345", depth=0.5, text=text, right=right)


def side(
    *ttfts: float,
    answers: tuple[Answer, ...] | None = None,
    nats: float = 2.0,
    density: float = 0,
    other_cores: float = 0,
) -> SideRow:
    """A document for each TTFT; `nats` per token, and three times as many in the second half."""
    loss = Loss(tokens=100, nats=100 * nats, second_half_tokens=50, second_half_nats=150 * nats)
    return SideRow(
        documents=tuple(
            DocumentRun(
                seed=number,
                prompt_tokens=4000 + number,
                ttft_seconds=ttft,
                answers=(answer(),) if answers is None else answers,
                other_cores=other_cores,
                sparse_layer_tokens=100 if density else 0,
                computed_tiles=1000 * density,
                causal_tiles=1000 if density else 0,
                loss=None if number else loss,
            )
            for number, ttft in enumerate(ttfts)
        )
    )


def row(dense: SideRow, sparse: SideRow, length: int = 4096, scaled: bool = False) -> Row:
    return Row(length=length, scaled=scaled, sparse_expected=True, dense=dense, sparse=sparse)


def results(*rows: Row, model: str = "a-model") -> Results:
    return Results(
        made_at=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        model=model,
        threads=2,
        chunk_tokens=2048,
        repeat="vllm-sparse demo --lengths 4096",
        machine=this_machine(),
        sparse_config={},
        sparse_info={"isa": "avx2", "profile": "uniform", "digest": ""},
        rows=rows,
        servers=(
            ServerRun(side="dense", lengths=(4096,), startup_seconds=30.0, command="vllm serve"),
        ),
        seconds=300,
    )
