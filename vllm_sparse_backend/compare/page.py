"""The comparison as one HTML page: self-contained, without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_sparse_backend.compare import table, verdict
from vllm_sparse_backend.compare.methods import KEEP_ALL
from vllm_sparse_backend.compare.plots import frontier_figure, selection_figure
from vllm_sparse_backend.compare.results import Comparison
from vllm_sparse_backend.report.svg import inline
from vllm_sparse_backend.report.template import environment

TEMPLATE = "page.html.j2"


def render_html(found: Comparison) -> str:
    """Everything but the plots is escaped."""
    from markupsafe import Markup

    pages = environment(Path(__file__).parent)
    pages.filters |= {"thousands": "{:,}".format, "share": table.share, "change": table.change}
    longest = found.lengths[-1]
    summary = verdict.summary(found)
    return pages.get_template(TEMPLATE).render(
        found=found,
        headline=summary[0],
        summary=summary[1:],
        figures=list(_figures(found)),
        frontiers=[
            (length, Markup(_frontier(found, length)), verdict.frontier(found, length))
            for length in reversed(found.lengths)
        ],
        selection=Markup(
            inline(selection_figure(found, longest), "selection", "What choosing tiles costs")
        ),
        rows=table.rows(found),
        headings=table.headings(found),
        reach=[(length, _reach(found, length)) for length in reversed(found.lengths)],
        sale=[its for length in found.lengths if (its := verdict.sale_own(found, length))],
        sale_setting=verdict.SALE_SETTING,
        efficiency=[
            (its.name, [verdict.efficiency(found, its, error) for error in found.errors])
            for its in found.methods
        ],
        perplexities=[its for method in found.methods for its in method.perplexities],
        said=table.said(found),
        limit=verdict.LIMIT,
    )


def _frontier(found: Comparison, length: int) -> str:
    figure = frontier_figure(found, length)
    return inline(figure, f"frontier-{length}", f"Error against time at {length:,} tokens")


Times = list[float | None]  # one for each error; None: not reached


def _reach(found: Comparison, length: int) -> list[tuple[str, Times, Times]]:
    """Of each method: the time for each error, and what it is over the default's method's."""
    ours = found.method(found.default_method)
    base = [verdict.reach(found, ours, length, error) for error in found.errors]
    made = []
    for method in found.methods:
        times = [verdict.reach(found, method, length, error) for error in found.errors]
        over = [
            time / its if time is not None and its is not None else None
            for time, its in zip(times, base, strict=True)
        ]
        made.append((method.name, times, over))
    return made


def _figures(found: Comparison) -> Iterator[tuple[str, str]]:
    """The largest numbers on the page: each and what it is, most telling first."""
    longest = found.lengths[-1]
    at = f"at {longest:,} tokens"
    if (its := found.point(found.default, longest)) is not None:
        yield f"{1 / its.time:.2f}×", f"as fast as dense: the default {at}"
        yield f"{its.error:.4f}", f"relative L1 of the default {at}"
    if (sale := verdict.sale_own(found, longest)) is not None:
        if sale.over_sale is not None:
            yield f"{sale.over_sale:.2f}", f"of SALE's time at SALE's own error {at}"
        if sale.over_rival is not None and sale.rival is not None:
            yield f"{sale.over_rival:.2f}", f"of {sale.rival.name}'s, the best other method's"
    kept = found.point(KEEP_ALL, longest)
    if kept is not None:
        yield f"{1 / kept.time:.2f}×", f"as fast as dense with every tile kept {at}"
