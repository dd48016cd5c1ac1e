"""What the demo says about its results: the sums, the page, the table."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _demo_results import answer, results, row, side
from rich.console import Console

from vllm_sparse_backend.demo.plot import ttft_svg
from vllm_sparse_backend.demo.report import print_table, render_html, write_report
from vllm_sparse_backend.demo.results import Results

WRONG = answer(" 54321. Remember it.", right=False)
TYPICAL = results(
    row(side(0.5, 0.6, 0.7), side(0.5, 0.55, 0.7), length=1024),
    row(side(4.0, 9.0, 3.0), side(2.0, 1.0, 9.0, density=0.25)),
    row(side(40.0), side(10.0, density=0.125), length=16384, scaled=True),
)


def test_a_row_sums_up_its_documents() -> None:
    _, found, far = TYPICAL.rows
    assert found.dense.ttft_seconds == 4.0  # the median, not the mean
    assert found.speedup == 2.0
    assert found.density == 0.25
    assert found.dense.perplexity == pytest.approx(math.e**2)
    assert found.dense.second_half_perplexity == pytest.approx(math.e**6)
    assert TYPICAL.rows[0].density is None
    assert f"{far.speedup:.1f} times as fast" in TYPICAL.headline()
    assert TYPICAL.losses() == []


def test_a_needle_that_only_dense_found_is_a_loss() -> None:
    lost = results(row(side(4.0), side(2.0, answers=(WRONG,))))
    assert len(lost.losses()) == 1
    assert "12345" in lost.losses()[0] and "54321" in lost.losses()[0]
    assert "nothing is lost" not in lost.headline()


def test_a_needle_that_dense_did_not_find_either_is_none() -> None:
    assert results(row(side(4.0, answers=(WRONG,)), side(2.0, answers=(WRONG,)))).losses() == []
    assert results(row(side(4.0, answers=(WRONG,)), side(2.0))).losses() == []


@pytest.mark.parametrize(
    ("rise", "lost"), [(-0.05, False), (0.009, False), (0.011, True), (math.nan, True)]
)
def test_a_perplexity_that_rises_by_more_than_one_percent_is_a_loss(
    rise: float, lost: bool
) -> None:
    run = results(row(side(4.0), side(2.0, nats=2.0 + math.log1p(rise))))
    assert bool(run.losses()) is lost


def test_a_measurement_beside_other_work_is_marked() -> None:
    run = results(row(side(4.0, 4.0, other_cores=0.9), side(2.0, 2.0)))
    assert len(run.disturbances()) == 1
    assert "dense: other programs used 0.9 cores" in run.disturbances()[0]
    assert run.disturbances()[0] in render_html(run)
    assert TYPICAL.disturbances() == []
    assert "Something else was computing" not in render_html(TYPICAL)


def test_results_survive_json(tmp_path: Path) -> None:
    data, page = write_report(TYPICAL, tmp_path / "made" / "here")
    assert Results.model_validate_json(data.read_text()) == TYPICAL
    assert page.read_text().startswith("<!doctype html>")


class _Page(HTMLParser):
    """Which elements there are, and whether they are closed in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    html = render_html(TYPICAL)
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert page.seen["svg"] == 1
    assert not page.seen.keys() & {"script", "link", "img", "iframe"}
    # Names of XML namespaces are not fetched; anything else that looks like an address would be.
    assert re.findall(r"https?://[^\s\"'<]+", html.replace("http://www.w3.org/", "")) == []
    for figure in ("4,001", "4.00 s", "2.00×", "0.250", "all dense", "1 of 1", "7.389", "+0.00%"):
        assert figure in html


def test_the_page_says_what_was_lost() -> None:
    html = render_html(results(row(side(4.0), side(2.0, answers=(WRONG,)))))
    assert "Lost against dense" in html
    assert "Lost against dense" not in render_html(TYPICAL)


def test_what_a_model_says_is_text_and_not_markup() -> None:
    evil = answer('<script>alert("x")</script>', right=False)
    html = render_html(results(row(side(4.0), side(2.0, answers=(evil,))), model="<b>&amp;</b>"))
    assert "<script" not in html and "<b>" not in html
    assert "&lt;script&gt;" in html and "&lt;b&gt;&amp;amp;&lt;/b&gt;" in html


def test_the_plot_is_valid_and_the_same_every_time() -> None:
    svg = ttft_svg(TYPICAL)
    assert svg == ttft_svg(TYPICAL)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    words = "".join(root.itertext())
    for label in ("dense", "sparse", "prompt tokens", "2.0×", "4.0×"):
        assert label in words
    assert "currentColor" in svg


def test_a_plot_of_one_length_is_drawn() -> None:
    ElementTree.fromstring(ttft_svg(results(row(side(4.0), side(2.0, density=0.5)))))


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    long = row(side(123.4), side(45.6, nats=3.0, density=0.123), length=131072)
    out = io.StringIO()
    print_table(results(*TYPICAL.rows, long), Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text
    for figure in ("4,001", "4.00 s", "2.00x", "0.250", "1/1", "7.389", "LOST"):
        assert figure in text
