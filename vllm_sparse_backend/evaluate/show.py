"""An evaluation on the terminal: every task and length by itself, never only a mean."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_sparse_backend.evaluate.results import Cell, Evaluation, Row

ASKED = (
    "questions", "tokens", "asked", "dense", "sparse", "lost", "gained", "retained", "density",
    "dense TTFT", "sparse TTFT",
)  # fmt: skip
SCORED = (
    "text", "tokens", "scored", "dense", "sparse", "change", "95%", "worst 1%", "agreed", "density",
)  # fmt: skip


def show(evaluation: Evaluation, console: Console) -> None:
    """Tables of what was asked and of what was scored, and what was lost."""
    console.print(
        f"{evaluation.model}, {evaluation.dtype}, threads: {evaluation.threads}, "
        f"{evaluation.isa}; {evaluation.policies}",
        markup=False,
        soft_wrap=True,
    )
    asked = [row for row in evaluation.rows if row.retrieval is not None]
    if asked:
        console.print(_table("right answers", ASKED, map(_asked, asked)))
        if said := evaluation.dense_times():
            console.print(f"TTFT: {said}", markup=False, soft_wrap=True)
    for task in dict.fromkeys(row.task for row in asked):
        console.print(_grid(task, evaluation.grid(task)))
    scored = [row for row in evaluation.rows if row.likelihood is not None]
    if scored:
        console.print(_table("perplexity", SCORED, map(_scored, scored)))
    for line in evaluation.warnings():
        console.print(f"DENSE  {line}", style="yellow", markup=False, soft_wrap=True)
    for line in evaluation.losses():
        console.print(f"LOST  {line}", style="bold red", markup=False, soft_wrap=True)
    if not evaluation.losses():
        console.print("Nothing is lost.", style="bold")


def _table(title: str, headings: Iterable[str], rows: Iterable[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _asked(row: Row) -> list[str]:
    found = row.retrieval
    assert found is not None
    kept = found.retained_interval
    return [
        row.task,
        f"{row.length:,}",
        str(found.asked),
        str(found.dense_right),
        str(found.sparse_right),
        str(found.lost),
        str(found.gained),
        "" if kept is None else f"{found.retained:.0%} ({kept.low:.0%}-{kept.high:.0%})",
        _density(row),
        _seconds(row.dense_ttft_median),
        _seconds(row.sparse_ttft_median),
    ]


def _scored(row: Row) -> list[str]:
    found, agreed = row.likelihood, row.agreement
    assert found is not None and agreed is not None
    spread = found.change_interval
    return [
        f"{row.task} ({row.text})",
        f"{row.length:,}",
        f"{found.tokens:,}",
        f"{found.dense_perplexity:.3f}",
        f"{found.sparse_perplexity:.3f}",
        f"{found.change_percent:+.2f}%",
        "" if spread is None else f"{spread.low:+.2f} to {spread.high:+.2f}",
        f"{found.worst_nats:+.2f}",
        f"{agreed.agreed_share:.0%}, {agreed.identical}/{agreed.continuations}",
        _density(row),
    ]


def _grid(task: str, cells: list[tuple[int, Cell]]) -> Table:
    """Length by depth, "dense>sparse" right answers where they differ."""
    depths = sorted({cell.depth for _, cell in cells})
    by_place = {(length, cell.depth): cell for length, cell in cells}
    lengths = dict.fromkeys(length for length, _ in cells)
    headings = ["tokens", *(f"{depth:.0%}" for depth in depths)]
    return _table(
        f"{task}: right by depth; dense, then sparse where that differs",
        headings,
        [
            [f"{length:,}", *(_cell(by_place.get((length, depth))) for depth in depths)]
            for length in lengths
        ],
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    dense = f"{cell.dense_right}/{cell.asked}"
    sparse = f"{cell.sparse_right}/{cell.asked}"
    return dense if sparse == dense else f"{dense} {sparse}"


def _density(row: Row) -> str:
    return "dense" if row.density is None else f"{row.density:.3f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
