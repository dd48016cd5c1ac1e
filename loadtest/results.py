"""The benchmark's report: a table, JSON, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measure import SDPA, Case, Result
from pydantic import BaseModel
from rich.table import Table

PHASES = ("pack", "select", "attend")


class Report(BaseModel):
    """A run of the benchmark and the machine it was on."""

    impl: str = "cpu"
    baseline: str = "CPU_ATTN"  # vLLM's own attention there
    isa: str  # or the GPU's architecture
    features: list[str]  # of the machine, as far as they matter
    threads: int
    dtype: str
    peak_gops: dict[str, float]  # one thread's or the GPU's, in 1e9 operations a second
    versions: dict[str, str]
    cases: list[Case] = []

    @property
    def refused(self) -> bool:
        """Whether some contender was too far off for its speed to be reported."""
        return any(result.refused for case in self.cases for result in case.results)


def table(report: Report) -> Table:
    """For people."""
    made = Table(
        "case", "contender", "s", "pack/select/attend", "density", "GFLOP/s (peak)",
        f"x {report.baseline}", "x SDPA", "rel. L1 (worst 1%)", "recall (worst 1%)", "needles",
        title=f"{report.isa}, {report.threads} thread(s), {report.dtype}",
    )  # fmt: skip
    for case in report.cases:
        first = (
            f"{case.shape} {case.heads}/{case.kv_heads}/{case.head_dim} of {case.heads_of_model} "
            f"heads, {case.layers} layer(s) {case.input}\n{case.length:,} tokens: {case.mode}\n"
            f"oracle {case.oracle_density[64]:.3f} (64), {case.oracle_density[16]:.3f} (16)"
        )
        for each in case.results:
            made.add_row(first, *_row(each, report.baseline))
            first = ""
        made.add_section()
    return made


def _row(each: Result, baseline: str) -> list[str]:
    ratios = [f"{each.ratio[b]:.2f}" if b in each.ratio else "" for b in (baseline, SDPA)]
    if each.refused:
        ratios = [each.refused, ""]
    phases = (each.pack_seconds, each.select_seconds, each.attend_seconds)
    error = each.error
    return [
        each.name,
        f"{each.seconds:.4g}",
        "/".join(f"{seconds:.3g}" for seconds in phases) if any(phases) else "",
        f"{each.density:.3f}",
        f"{each.gflops:.0f} ({each.peak_share:.0%})",
        *ratios,
        f"{error.relative_l1:.4f} ({error.worst_rows:.3f})" if error else "",
        f"{error.recall:.4f} ({error.worst_recall:.3f})" if error else "",
        f"{error.needles}/{error.needles_of}" if error and error.needles_of else "",
    ]


def draw(report: Report, folder: Path) -> list[Path]:
    """Speed-up against length, and seconds by phase; PNG and SVG. Returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Case]] = {}
    for case in sorted(report.cases, key=lambda case: case.length):
        groups.setdefault(f"{case.shape}, {case.input}", []).append(case)
    made = []
    for name, paint in (("speedup", _speedups), ("phases", _phases)):
        figure, axes = plt.subplots(
            1, len(groups), figsize=(5.2 * len(groups), 3.8), squeeze=False, layout="constrained"
        )
        for axis, (title, cases) in zip(axes[0], groups.items(), strict=True):
            paint(axis, cases, report.baseline)
            axis.set_title(title)
        for suffix in ("png", "svg"):
            made.append(folder / f"{name}.{suffix}")
            figure.savefig(made[-1], dpi=120)
        plt.close(figure)
    return made


def _speedups(axis: Any, cases: list[Case], baseline: str) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for each in case.results:
            if baseline in each.ratio:
                series.setdefault(each.name, []).append((case.length, each.ratio[baseline]))
    for name, points in series.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xscale="log", xlabel="tokens", ylabel=f"times as fast as {baseline}")
    _lengths(axis, cases)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.legend(fontsize=8)


def _phases(axis: Any, cases: list[Case], baseline: str) -> None:
    """Of the baseline's seconds, by phase; the last policy of the command line."""
    last = [case.results[-1 - sum(r.error is None for r in case.results)] for case in cases]
    base = [next(r.seconds for r in case.results if r.name == baseline) for case in cases]
    bottom = [0.0] * len(cases)
    names = [f"{case.length:,}" for case in cases]
    for phase in PHASES:
        share = [100 * getattr(r, f"{phase}_seconds") / b for r, b in zip(last, base, strict=True)]
        axis.bar(names, share, bottom=bottom, label=phase)
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]
    axis.set(xlabel="tokens", ylabel=f"% of {baseline}'s seconds\n({last[-1].name})")
    axis.tick_params(axis="x", rotation=45)
    axis.legend(fontsize=8)


def _lengths(axis: Any, cases: list[Case]) -> None:
    lengths = sorted({case.length for case in cases})
    axis.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axis.minorticks_off()
