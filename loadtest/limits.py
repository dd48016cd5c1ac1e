"""How far the op is from the limit: tables for docs/limits.md from reports of kernels.py.

    python loadtest/limits.py report.json ...

The limit of a case is what an oracle's tiles would cost at the machine's peak: the fewest tiles of
16 keys that hold 98% of the mass, both products of them, and nothing to find them by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from measure import Case, Result
from results import Report

HEADER = (
    "case", "tokens", "policy", "density", "rel. L1", "pack", "select", "attend",
    "attend / (density x keep-all)", "oracle at peak", "share of that limit", "x dense",
)  # fmt: skip


def row(
    case: Case, each: Result, keep_all: Result, peak_seconds: float, baseline: str
) -> list[str]:
    """One policy of a case; phases and the limit in percent of the baseline's seconds."""
    base = next(r.seconds for r in case.results if r.name == baseline)
    limit = case.oracle_density[16] * peak_seconds
    phases = (each.pack_seconds, each.select_seconds, each.attend_seconds)
    return [
        f"{case.shape}, {case.input}",
        f"{case.length:,}",
        each.name,
        f"{each.density:.3f}",
        f"{each.error.relative_l1:.4f}" if each.error else "",
        *(f"{seconds / base:.1%}" for seconds in phases),
        f"{each.attend_seconds / (each.density * keep_all.attend_seconds):.2f}",
        f"{limit / base:.1%}",
        f"{limit / each.seconds:.0%}",
        f"{each.ratio[baseline]:.2f}" if baseline in each.ratio else str(each.refused),
    ]


def rows(report: Report) -> list[list[str]]:
    """A row for every case and policy but the first, which keeps all. One thread's only."""
    if report.threads != 1:
        raise typer.BadParameter(f"want a report of one thread, got {report.threads}")
    peak = report.peak_gops[report.dtype if report.dtype == "bfloat16" else "float32"]
    made = []
    for case in report.cases:
        keep_all, *others = [each for each in case.results if each.error]
        peak_seconds = keep_all.gflops * keep_all.seconds / peak
        made += [row(case, each, keep_all, peak_seconds, report.baseline) for each in others]
    return made


def main(report: Annotated[list[Path], typer.Argument(help="JSON of kernels.py.")]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER))
    for path in report:
        for cells in rows(Report.model_validate_json(path.read_text())):
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
