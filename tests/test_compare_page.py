"""What is said of a comparison: verdicts, the table, the page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from _compare_records import DEFAULT, LENGTHS, comparison, ladder, methods, perplexity, point
from test_report import _Page

from vllm_sparse_backend.compare.end_to_end import about
from vllm_sparse_backend.compare.page import render_html
from vllm_sparse_backend.compare.plots import frontier_figure, selection_figure
from vllm_sparse_backend.compare.results import Comparison
from vllm_sparse_backend.compare.table import headings, markdown, rows
from vllm_sparse_backend.compare.verdict import (
    beating,
    best_other,
    efficiency,
    frontier,
    nearest,
    reach,
    sale_own,
    standing,
    summary,
)
from vllm_sparse_backend.report.svg import inline
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, Static

OURS = UNIFORM_DEFAULT.selector
RIVAL = Static(local=7)


def with_rival(error: float, time: float, name: str = "rival", spread: float = 0.02) -> Comparison:
    more = ladder(name, (RIVAL, error, time))
    points = [its.model_copy(update={"spread": spread}) for its in more.points]
    return comparison(methods=[*methods(), more.model_copy(update={"points": points})])


def test_the_default_is_on_the_frontier_or_the_page_says_who_beats_it() -> None:
    assert beating(comparison(), 4096) == []
    said = standing(comparison(), 4096)
    assert "an error of 0.0200 in 20.0% of dense attention's time, and is on the frontier" in said
    beaten = with_rival(0.015, 0.16)
    assert [name for name, _ in beating(beaten, 4096)] == ["rival"]
    said = standing(beaten, 4096)
    assert "is not on the frontier: static, local 7 of rival has 0.0150 in 16.0%, 0.80 of" in said
    assert "repetitions" not in said
    noisy = with_rival(0.015, 0.19, spread=0.1)
    assert "repetitions of the two differ by 10%, which is more than that" in standing(noisy, 4096)
    assert "was not measured" in standing(comparison(default="something else"), 4096)


def test_the_frontier_leaves_profiles_out() -> None:
    best = frontier(comparison(), 4096)
    assert set(best) == {"dense", OURS}
    assert [its.error for its in best[OURS]] == [0.01, 0.02, 0.04]
    mixed = ladder("profile mine", (None, 0.001, 0.01), setting="profile mine")
    found = comparison(methods=[*methods(), mixed])
    assert frontier(found, 4096) == best and beating(found, 4096) == []
    assert reach(found, mixed, 4096, 0.02) == 0.01, "it is compared all the same"


def test_at_sales_own_error() -> None:
    its = sale_own(comparison(), 4096)
    assert its is not None and its.rival is not None
    assert (its.error, its.time, its.ours) == pytest.approx((0.02, 0.4, 0.2))
    assert (its.over_sale, its.over_rival) == pytest.approx((0.5, 0.8))
    assert its.rival.name == "static"
    assert (
        "takes 0.50 of SALE's time and 0.80 of that of the best other method, static."
        in (summary(comparison())[-1])
    )
    # What is ours, a profile, or every tile kept is no other method.
    rivals = comparison(methods=methods()[:2])
    assert best_other(rivals, 4096, 0.5) is None and sale_own(rivals, 4096) is None
    lost = [
        its.model_copy(update={"points": its.points[::3]}) if its.own else its for its in methods()
    ]
    assert "the default's method" in summary(comparison(methods=lost))[-1]


def test_the_nearest_setting_is_the_cheapest_within_the_error() -> None:
    points = comparison().method(OURS).of_length(4096)
    its = nearest(points, 0.03)
    assert its is not None and its.setting == DEFAULT
    least = nearest(points, 0.001)
    assert least is not None and least.error == 0.01
    assert nearest([], 0.1) is None


def test_what_the_table_shows_is_evaluated_first() -> None:
    points = comparison().method(OURS).of_length(4096)  # of errors 0.01, 0.02, 0.04
    assert [its.error for its in about(points, 0.03, 3)] == [0.02, 0.04, 0.01]
    assert [its.error for its in about(points, 0.015, 2)] == [0.01, 0.02]
    assert [its.error for its in about(points, 0.001, 1)] == [0.01]


def test_efficiency_lengths_are_of_an_error() -> None:
    found = comparison()
    assert str(efficiency(found, found.method(OURS), 0.02)) == "≤ 4,096"
    # 1.3 of dense's time at 4096 tokens, 0.65 at 16384.
    far = found.method("far")
    assert str(efficiency(found, far, 0.02)) == "not reached"
    assert efficiency(found, far, 0.95).length == pytest.approx(4096 * 1.3**2)


def test_the_table_has_a_row_for_every_method() -> None:
    evaluated = [
        its.model_copy(update={"perplexities": [perplexity(DEFAULT, 0.2)]}) if its.own else its
        for its in methods()
    ]
    found = comparison(methods=evaluated)
    by_name = {row[0]: dict(zip(headings(found), row, strict=True)) for row in rows(found)}
    assert list(by_name) == ["dense", OURS, "sale-paper", "static", "far"]
    ours = by_name[OURS]
    assert ours["setting, 16,384 tokens"] == f"{DEFAULT}, the default"
    assert (ours["error"], ours["time"], ours["time to 0.02"]) == ("0.0200", "10.0%", "10.0%")
    assert (
        ours["perplexity, text"] == "+0.20 ± 0.05%" and ours["settings on the frontier"] == "3 of 3"
    )
    assert by_name["far"]["time to 0.02"] == "not reached"
    assert (
        by_name["static"]["settings on the frontier"] == ""
        and by_name["static"]["perplexity, text"] == "–"
    )
    lines = markdown(found).splitlines()
    assert len(lines) == 2 + 5 and {line.count("|") for line in lines} == {len(ours) + 1}


def test_the_page_has_every_part_and_needs_nothing_else() -> None:
    evaluated = [
        its.model_copy(update={"perplexities": [perplexity(DEFAULT, 0.2, None)]})
        if its.own
        else its
        for its in methods()
    ]
    html = render_html(comparison(methods=evaluated))
    found = _Page(html)
    assert found.seen["svg"] == len(LENGTHS) + 1
    assert "script" not in found.seen and "link" not in found.seen and "img" not in found.seen
    assert re.findall(r"https?://[^\s\"'<]+", html.replace("http://www.w3.org/", "")) == []
    for said in (
        "is on the frontier: no measured setting", "dense is CPU_ATTN, 1 s at 4,096 tokens; 10 s",
        "takes 0.50 of SALE's time", "not reached", "≤ 4,096", "+0.20%", "a book; seed 0",
        f"{OURS} (0.0100 in 15.0%, 0.0200 in 10.0%, 0.0400 in 7.5%)", "10.00×",
        "left out: no settings", "vllm-sparse compare a-model --text book.txt",
        "static a rule (chosen in torch)", f"{DEFAULT}, the default",
    ):  # fmt: skip
        assert said in found.text, said


def test_what_was_not_measured_is_said() -> None:
    found = _Page(render_html(comparison(methods=methods()[:2], left_out={})))
    assert "SALE's own setting was not measured." in found.text
    assert "Nothing was evaluated end to end. vllm-sparse compare --end-to-end 1" in found.text
    beaten = _Page(render_html(with_rival(0.015, 0.16)))
    assert "is not on the frontier" in beaten.text


def test_what_was_disturbed_is_said() -> None:
    found = _Page(render_html(comparison(disturbed=["static, 4,096 tokens: dense took 3"])))
    assert "Disturbed by something else on the machine: static, 4,096 tokens" in found.text
    assert "Disturbed" not in _Page(render_html(comparison())).text


def test_names_are_text_and_not_markup() -> None:
    evil = "<script>alert('x')</script>"
    html = render_html(comparison(
        model=evil, texts=[evil], repeat=evil, left_out={evil: evil},
        methods=[*methods(), ladder(evil, (RIVAL, 0.5, 0.5), what=evil)],
    ))  # fmt: skip
    assert "<script" not in html and html.count("&lt;script&gt;") >= 8


def test_pictures_say_what_they_show_and_are_the_same_every_time() -> None:
    found = comparison()
    for draw, labels in (
        (lambda: frontier_figure(found, 4096), ("static", f"{OURS} (frontier)", "the default",
                                                "SALE's own setting", "relative L1 error")),
        (lambda: selection_figure(found, 4096), ("far", "choosing tiles", "0.900, not reached")),
    ):  # fmt: skip
        svg = inline(draw(), "x", "a title")
        assert svg == inline(draw(), "x", "a title")
        said = " ".join(ElementTree.fromstring(svg).itertext())
        for label in labels:
            assert label in said, label


def test_the_data_come_back_as_they_were() -> None:
    found = comparison()
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    assert found.point(DEFAULT, 4096) == point(UNIFORM_DEFAULT, 4096, 0.02, 0.2)
