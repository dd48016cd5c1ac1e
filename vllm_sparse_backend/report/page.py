"""The report: one HTML page about a profile, from what calibration and evaluation left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sparse_backend.evaluate.results import PERPLEXITY_LOSS, Evaluation, Interval, Row
from vllm_sparse_backend.profile import Profile
from vllm_sparse_backend.report import calibration_plots, eval_plots
from vllm_sparse_backend.report.heads import Inspection, inspect_profile
from vllm_sparse_backend.report.heads_plot import heads_figure
from vllm_sparse_backend.report.measured import Found
from vllm_sparse_backend.report.svg import inline
from vllm_sparse_backend.report.template import environment
from vllm_sparse_backend.report.verdict import headline, verdict

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Inputs:
    """What a page is made of."""

    profile: Profile
    profile_file: str
    found: Found  # the measurement
    evaluations: Sequence[Evaluation]

    @property
    def inspection(self) -> Inspection:
        """Of the profile's heads, at the longest measured length."""
        return inspect_profile(self.profile, self.found)


def render_html(inputs: Inputs) -> str:
    """The page: self-contained, without scripts. Everything but the plots is escaped."""
    from markupsafe import Markup

    pages = environment(Path(__file__).parent)
    pages.filters |= {"interval": interval, "thousands": "{:,}".format, "percent": percent}
    pages.filters["density"] = row_density
    inspection, measurement = inputs.inspection, inputs.found.measurement
    evaluations = list(inputs.evaluations)
    rows = [(number, row) for number, e in enumerate(evaluations, 1) for row in e.rows]
    return pages.get_template(TEMPLATE).render(
        profile=inputs.profile,
        profile_file=inputs.profile_file,
        inspection=inspection,
        measurement=measurement,
        budget_of=measurement and calibration_plots.BUDGET_OF.get(measurement.rule),
        why_no_measurement=inputs.found.why_not,
        evaluations=evaluations,
        losses=[line for evaluation in evaluations for line in evaluation.losses()],
        loss=PERPLEXITY_LOSS,
        verdict=verdict(measurement, evaluations),
        figures=headline(inspection.density, inspection.length, measurement, evaluations),
        retrieval=[(number, row) for number, row in rows if row.retrieval],
        likelihood=[(number, row) for number, row in rows if row.likelihood],
        agreement=[(number, row) for number, row in rows if row.agreement],
        plots={name: Markup(svg) for name, svg in _plots(inputs, inspection)},
        needles=[
            (task, Markup(inline(eval_plots.needles_figure(evaluations, task), task, _alt(task))))
            for task in eval_plots.needle_tasks(evaluations)
        ],
    )


def _plots(inputs: Inputs, inspection: Inspection) -> Iterator[tuple[str, str]]:
    """The pictures there is data for, by name."""
    measurement, evaluations = inputs.found.measurement, inputs.evaluations
    heads = heads_figure(inspection)
    yield "heads", inline(heads, "heads", "Policy and density of each layer and head")
    if measurement is not None and measurement.curves:
        curves = calibration_plots.curves_figure(measurement)
        yield "curves", inline(curves, "curves", "Error against density by selector and length")
    if rows := eval_plots.perplexity_rows(evaluations):
        perplexity = eval_plots.perplexity_figure(rows)
        yield "perplexity", inline(perplexity, "perplexity", "Perplexity by position")
    if any(row.dense_ttft and row.sparse_ttft for e in evaluations for row in e.rows):
        ttft = eval_plots.ttft_figure(evaluations)
        yield "ttft", inline(ttft, "ttft", "Time to first token against prompt length")
    elif measurement is not None and measurement.predicted:
        predicted = calibration_plots.predicted_figure(measurement)
        yield "predicted", inline(predicted, "predicted", "Predicted seconds of attention")


def _alt(task: str) -> str:
    return f"{task}: right answers by prompt length and depth, dense and sparse"


def interval(value: Interval | None, form: str = "{:.1f}", scale: float = 1.0) -> str:
    """ "96.1 to 99.8", or nothing."""
    if value is None:
        return ""
    return f"{form.format(scale * value.low)} to {form.format(scale * value.high)}"


def percent(value: float | None) -> str:
    """ "98.4%", or a dash."""
    return "–" if value is None else f"{value:.1%}"


def row_density(row: Row) -> str:
    """For the table."""
    return "all dense" if row.density is None else f"{row.density:.3f}"
