"""What the demo shows for its results: a table on the terminal, and one HTML page."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_sparse_backend.demo.plot import ttft_svg
from vllm_sparse_backend.demo.results import PERPLEXITY_LOSS, Results, Row, SideRow
from vllm_sparse_backend.report.template import environment

TEMPLATE = "report.html.j2"
COLUMNS = (
    "prompt\ntokens", "TTFT\ndense", "TTFT\nsparse", "\nratio", "\ndensity", "answers\ndense",
    "answers\nsparse", "perpl.\ndense", "perpl.\nsparse", "\nchange",
)  # fmt: skip


def write_report(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write results.json and report.html into `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "results.json", folder / "report.html"
    data.write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    page.write_text(render_html(results), encoding="utf-8")
    return data, page


def render_html(results: Results) -> str:
    """The page: self-contained, without scripts. Everything but the plot is escaped."""
    from markupsafe import Markup

    pages = environment(Path(__file__).parent)
    pages.filters["seconds"] = seconds
    pages.filters["signed"] = signed
    return pages.get_template(TEMPLATE).render(
        results=results,
        plot=Markup(ttft_svg(results)),
        found=found,
        answers=answers,
        perplexity_loss=PERPLEXITY_LOSS,
    )


def print_table(results: Results, console: Console) -> None:
    """The same figures for the terminal, and what was lost."""
    table = Table(
        title=f"{results.model}, {results.dtype}, threads: {results.threads}",
        box=box.SIMPLE_HEAD,
        padding=0,  # with the gaps below, fits into 80 columns
        pad_edge=False,
    )
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.rows:
        table.add_row(*_cells(row))
    console.print(table)
    for line in results.disturbances():
        console.print(f"BUSY  {line}", style="yellow", markup=False, soft_wrap=True)
    for line in results.losses():
        console.print(f"LOST  {line}", style="bold red", markup=False, soft_wrap=True)
    console.print(results.headline(), style="bold", markup=False, soft_wrap=True)


def _cells(row: Row) -> list[str]:
    perplexities = [row.dense.perplexity, row.sparse.perplexity]
    return [
        f"{row.prompt_tokens:,}",
        f"{seconds(row.dense.ttft_seconds)} s",
        f"{seconds(row.sparse.ttft_seconds)} s",
        f"{row.speedup:.2f}x",
        "dense" if row.density is None else f"{row.density:.3f}",
        f"{row.dense.right}/{len(row.dense.answers)}",
        f"{row.sparse.right}/{len(row.sparse.answers)}",
        *("" if perplexity is None else f"{perplexity:.3f}" for perplexity in perplexities),
        signed(row.perplexity_change),
    ]


def found(side: SideRow) -> str:
    """How many of the needles: "8 of 9"."""
    return f"{side.right} of {len(side.answers)}"


def answers(row: Row) -> list[dict[str, object]]:
    """A line for every question of a row: what was hidden where, what each side said."""
    return [
        {"document": number, "depth": a.depth, "name": a.name, "expected": a.expected}
        | {"dense": a, "sparse": b}
        for number, (dense, sparse) in enumerate(
            zip(row.dense.documents, row.sparse.documents, strict=True), 1
        )
        for a, b in zip(dense.answers, sparse.answers, strict=True)
    ]


def seconds(value: float) -> str:
    """Three figures are enough of a time."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def signed(change: float | None) -> str:
    """A relative change: "+0.23%"."""
    return "" if change is None else f"{change:+.2%}"
