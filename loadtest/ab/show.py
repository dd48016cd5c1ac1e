"""What the command shows: a table on the terminal, results.json, and one HTML page."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_sparse_backend.report.template import environment

from .counters import LAYER_TOKENS
from .plots import NAMES, pictures
from .run import SIDES
from .statistics import Estimate
from .summary import Check, Summary

TEMPLATE = "page.html.j2"


def write_report(summary: Summary, folder: Path) -> tuple[Path, Path]:
    """Write results.json and report.html into `folder`; their paths."""
    data, page = folder / "results.json", folder / "report.html"
    data.write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
    page.write_text(render_html(summary), encoding="utf-8")
    return data, page


def render_html(summary: Summary) -> str:
    """The page: self-contained, without scripts. Everything but the plots is escaped."""
    from markupsafe import Markup

    pages = environment(Path(__file__).parent)
    pages.filters |= {"seconds": seconds, "ratio": ratio, "percent": percent}
    return pages.get_template(TEMPLATE).render(
        summary=summary,
        names=NAMES,
        sides=SIDES,
        crossover=crossover(summary),
        check=check_line,
        counters=_counters(summary),
        plots={name: Markup(svg) for name, svg in pictures(summary)},
    )


def print_table(summary: Summary, console: Console) -> None:
    """The same figures for the terminal."""
    table = Table(
        title=f"{summary.workload}: {summary.model}, {summary.repeats} x {summary.slower_of} "
        "requests a side; seconds",
        box=box.SIMPLE_HEAD,
        padding=0,  # with the gaps below, fits into 80 columns
        pad_edge=False,
    )
    table.add_column("requests")
    for heading in ("metric", "", "dense", "sparse", "sparse / dense (95% interval)"):
        table.add_column(f" {heading}", justify="right", no_wrap=True)
    for latency in summary.latencies:
        for row in latency.percentiles:
            if row.percent in (50, 99):
                cells = [f"p{row.percent}", seconds(row.dense), seconds(row.sparse)]
                cells += [ratio(row.ratio)]
                name = NAMES[latency.metric]
                table.add_row(latency.requests, f" {name}", *(f" {cell}" for cell in cells))
    console.print(table)
    for line in lines(summary):
        console.print(line, markup=False, soft_wrap=True)
    for line in summary.disturbances():
        console.print(f"BUSY     {line}", style="yellow", markup=False, soft_wrap=True)
    for line in summary.answers.lost:
        console.print(f"LOST     {line}", style="yellow", markup=False, soft_wrap=True)
    for check in summary.checks:
        style = "bold red" if check.crossed else "green"
        console.print(check_line(check), style=style, markup=False, soft_wrap=True)
    console.print(summary.headline(), style="bold", markup=False, soft_wrap=True)


def lines(summary: Summary) -> list[str]:
    """What is no latency, a line each."""
    dense, sparse = (summary.throughput[side] for side in SIDES)
    found = [
        f"tokens/s {dense.tokens_per_second:.0f} and {sparse.tokens_per_second:.0f}, requests/s "
        f"{dense.requests_per_second:.3f} and {sparse.requests_per_second:.3f}, within the SLO "
        f"{percent(dense.good_share)} and {percent(sparse.good_share)} "
        f"({dense.good_per_second:.3f} and {sparse.good_per_second:.3f} a second)"
    ]
    if (wait := summary.wait) is not None:
        found.append(
            f"short requests: {wait.behind} of {wait.pairs} behind longer prompts, pairs of these "
            f"{ratio(wait.behind_ratio)}; p99 wait {seconds(wait.dense[99])} and "
            f"{seconds(wait.sparse[99])} s, {ratio(wait.p99_ratio)}"
        )
        if len(wait.probe) == len(SIDES):
            both = " and ".join("/".join(map(seconds, wait.probe[side])) for side in SIDES)
            found.append(f"probes of one token, median/p99/max: {both} s")
    found.append(crossover(summary))
    answers = summary.answers
    again = answers.dense_again
    found.append(
        f"answers: {percent(answers.same)} the same, {percent(answers.prefix)} of their text from "
        f"the beginning on; dense against itself: "
        f"{'one repetition only' if again is None else percent(again)}"
    )
    if answers.asked:
        right = " and ".join(str(answers.right[side]) for side in SIDES)
        found.append(f"right answers: {right} of {answers.asked}")
    found.append(
        f"slower by more than 5% at the median: {len(summary.slower)} of {summary.slower_of} "
        f"requests; failed: {dense.failed} and {sparse.failed}"
    )
    if summary.density is not None:
        found.append(f"density of what the core prefilled: {summary.density:.3f}")
    return found


def crossover(summary: Summary) -> str:
    """From which prompt length on sparse is faster, in words."""
    if summary.crossover is None:
        return "sparse is not faster at the longest prompts"
    if not summary.crossover:
        return "sparse is faster at all prompt lengths that were sent"
    return f"sparse is faster from {summary.crossover:,.0f} prompt tokens on"


def check_line(check: Check) -> str:
    """ "CROSSED max_ttft_ratio: 1.204, want at most 1"."""
    word = "CROSSED " if check.crossed else "kept    "
    value = "nothing to judge by" if check.value is None else f"{check.value:.3f}"
    most = "at least" if check.name.startswith("min") else "at most"
    return f"{word} {check.name}: {value}, want {most} {check.limit:g}"


def _counters(summary: Summary) -> list[tuple[str, list[float]]]:
    """A line a counter, a value a turn."""
    names = sorted({name for turn in summary.turns for name in turn.counters})
    names = [name for name in names if 'layer="' not in name]  # of each layer: in results.json
    names.sort(key=lambda name: not name.startswith(LAYER_TOKENS))
    return [(name, [turn.counters.get(name, 0.0) for turn in summary.turns]) for name in names]


def seconds(value: float) -> str:
    """Three figures are enough of a time."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def ratio(estimate: Estimate | None) -> str:
    """ "0.41 (0.38 to 0.45)"."""
    if estimate is None:
        return "none"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def percent(share: float | None) -> str:
    """ "98.4%", or a dash."""
    return "–" if share is None else f"{share:.1%}"
