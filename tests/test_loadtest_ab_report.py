"""loadtest/ab: what is said about a load test, from one that took place (tests/loadtest_ab)."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _loadtest_ab import module, recorded
from rich.console import Console

from vllm_sparse_backend.config import SparseConfig

COUNTERS: Any = module("counters")
SHOW: Any = module("show")
BOUNDS: Any = module("workload").Bounds


def judged(**bounds: float) -> Any:
    setup, done = recorded()
    return module("judge").judge(setup, done, BOUNDS(**bounds), "python -m loadtest.ab small")


@pytest.fixture(scope="module")
def summary() -> Any:
    return judged(max_ttft_ratio=1.0, min_throughput_ratio=0.5, max_lost_answers=0)


def test_percentiles_are_those_of_the_tool(summary: Any) -> None:
    """Its own, over the repetitions' requests together, and by numpy's rule as there."""
    _, done = recorded()
    for side in ("dense", "sparse"):
        ttfts = [ttft for d in done if d.turn.side == side for ttft in d.measured.ttfts]
        row = summary.latency("all", "ttft")
        for percentile in row.percentiles:
            wanted = np.percentile(ttfts, percentile.percent)
            assert getattr(percentile, side) == pytest.approx(wanted)
    assert row.pairs == 72
    assert {each.requests for each in summary.latencies} == {"all", "short", "long"}


def test_ratios_and_intervals_are_of_the_same_pairs(summary: Any) -> None:
    for latency in summary.latencies:
        for each in latency.percentiles:
            assert each.ratio.value == pytest.approx(each.sparse / each.dense)
            assert each.ratio.low <= each.ratio.high


def test_the_counters_prove_who_ran_sparsely(summary: Any) -> None:
    for turn in summary.turns:
        sparse = COUNTERS.total(turn.counters, COUNTERS.LAYER_TOKENS, 'path="sparse"')
        assert bool(sparse) is (turn.side == "sparse")
    assert 0.1 < summary.density < 1
    setup, done = recorded()
    wrong = module("run").what_is_wrong
    assert all(wrong(d.turn, setup.dataset.prompts, SparseConfig()) is None for d in done)
    swapped = {"dense": "sparse", "sparse": "dense"}
    for each in done:
        other = each.turn.model_copy(update={"side": swapped[each.turn.side]})
        said = wrong(other, setup.dataset.prompts, SparseConfig())
        assert "dense server counted" in said or "nothing was prefilled sparsely" in said


def test_bounds_are_kept_or_crossed(summary: Any) -> None:
    assert [check.name for check in summary.checks] == [
        "max_ttft_ratio", "min_throughput_ratio", "max_lost_answers",
    ]  # fmt: skip
    assert summary.crossed == []
    strict = judged(max_ttft_ratio=0.01, max_short_wait_ratio=0.01, min_throughput_ratio=9)
    assert {check.name for check in strict.crossed} == {
        "max_ttft_ratio", "max_short_wait_ratio", "min_throughput_ratio",
    }  # fmt: skip
    assert "CROSSED  max_ttft_ratio" in SHOW.check_line(strict.crossed[0])


def test_a_bound_that_nothing_can_be_said_about_is_crossed() -> None:
    setup, done = recorded()
    workload = setup.workload.model_copy(update={"short_tokens": 16})  # no prompt is that short
    run = module("run")
    other = run.Setup(workload, setup.options, setup.config, setup.repeats, setup.dataset)
    found = module("judge").judge(other, done, BOUNDS(max_short_wait_ratio=9), "")
    assert found.wait is None and [c.value for c in found.crossed] == [None]
    assert "nothing to judge by" in SHOW.check_line(found.crossed[0])


def test_failed_requests_are_counted_and_left_out() -> None:
    setup, done = recorded()
    first = done[0].measured
    errors = ("refused", *first.errors[1:])
    broken = first.model_copy(update={"errors": errors, "ttfts": (0.0, *first.ttfts[1:])})
    done[0] = module("run").Done(done[0].turn, broken)
    found = module("judge").judge(setup, done, BOUNDS(), "")
    assert found.failed == 1
    assert found.latency("all", "ttft").pairs == 71
    assert found.answers.pairs == 71
    assert found.samples[0].times["dense"].ttft[0] is None
    assert SHOW.render_html(found)


def test_short_requests_behind_a_long_one() -> None:
    behind = module("judge").behind_longer(
        np.array([[0.0, 1.0, 6.0, 2.0]]),  # sent
        np.array([[5.0, 4.0, 1.0, 3.0]]),  # TTFT: the first is long, and prefilled until 5
        np.array([False, True, True, True]),
    )
    assert behind.tolist() == [[False, True, False, True]]


def test_goodput_allows_long_prompts_more(summary: Any) -> None:
    setup, done = recorded()
    slo = setup.workload.slo
    _, sparse = (summary.throughput[side] for side in ("dense", "sparse"))
    good = total = 0
    for each in (d.measured for d in done if d.turn.side == "sparse"):
        rows = zip(each.ttfts, each.latencies, each.output_lens, setup.dataset.prompts, strict=True)
        for ttft, latency, output, prompt in rows:
            total += 1
            tpot = (latency - ttft) / (output - 1)
            good += ttft <= slo.ttft_limit(prompt.prompt_tokens) and tpot <= slo.tpot_seconds
    assert sparse.good_share == pytest.approx(good / total)
    assert sparse.good_per_second == pytest.approx(sparse.requests_per_second * good / total, 0.01)


def test_answers_are_compared(summary: Any) -> None:
    answers = summary.answers
    assert answers.pairs == 72 and answers.asked == 12
    assert 0.5 < answers.same <= answers.prefix <= 1
    assert answers.dense_again is not None and answers.right["dense"] >= 10


def test_results_are_read_again(summary: Any) -> None:
    again = module("summary").Summary.model_validate_json(summary.model_dump_json())
    assert again == summary


class Page(HTMLParser):
    """Finds what would be fetched or run, and unclosed elements."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(summary: Any) -> None:
    html = SHOW.render_html(summary)
    page = Page()
    page.feed(html)
    assert page.open == [] and page.fetched == [] and "script" not in page.tags
    assert html.count("<svg ") == 4 and "mathdefault" not in html
    for wanted in ("95% interval", "goodput", "sparse_prefill_layer_tokens_total", "--seed 1"):
        assert wanted in html
    assert re.search(r"nan|None\b", re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)) is None


def test_what_comes_from_outside_is_escaped(summary: Any) -> None:
    html = SHOW.render_html(summary.model_copy(update={"about": "<script>alert(1)</script>"}))
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_the_table_fits_and_says_what_was_lost(summary: Any, tmp_path: Path) -> None:
    lost = summary.model_copy(
        update={"answers": summary.answers.model_copy(update={"lost": ("request 7: [b]dense",)})}
    )
    output = io.StringIO()
    SHOW.print_table(lost, Console(file=output, width=80))
    text = output.getvalue()
    assert "LOST     request 7: [b]dense" in text and "kept     max_ttft_ratio" in text
    table = text[: text.index("tokens/s")].splitlines()
    assert max(map(len, table)) <= 80 and "…" not in text
    data, page = SHOW.write_report(summary, tmp_path)
    assert data.is_file() and page.read_text().startswith("<!DOCTYPE html>")


def test_counters_are_differences_and_leave_the_engine_out() -> None:
    def metrics(sparse: int) -> str:
        return (
            "# TYPE vllm:sparse_prefill_layer_tokens counter\n"
            f'vllm:sparse_prefill_layer_tokens_total{{path="sparse",reason=""}} {sparse}\n'
            "# TYPE vllm:prefix_cache_hits counter\n"
            'vllm:prefix_cache_hits_total{engine="0",model_name="m"} 5\n'
            'vllm:prefix_cache_hits_total{engine="1",model_name="m"} 6\n'
            "# TYPE vllm:num_requests_running gauge\n"
            "vllm:num_requests_running 1\n"
        )

    before, after = (COUNTERS.read_counters(metrics(n)) for n in (1, 4))
    assert before["vllm:prefix_cache_hits_total"] == 11
    name = 'vllm:sparse_prefill_layer_tokens_total{path="sparse",reason=""}'
    assert COUNTERS.grown(before, after) == {name: 3}
    assert COUNTERS.total(after, COUNTERS.LAYER_TOKENS) == 4
    assert COUNTERS.density(after) is None
