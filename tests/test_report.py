"""`vllm-sparse report`: what the page says, what it leaves out and why, what it refuses."""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from _report_records import (
    LENGTHS,
    evaluation,
    likelihood,
    measurement,
    profile,
    retrieval,
    save_both,
)
from typer.testing import CliRunner, Result

from vllm_sparse_backend.calibrate.results import measurement_of
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.evaluate.results import Evaluation
from vllm_sparse_backend.profile import Profile
from vllm_sparse_backend.report.calibration_plots import curves_figure, predicted_figure
from vllm_sparse_backend.report.eval_plots import (
    needles_figure,
    perplexity_figure,
    perplexity_rows,
    ttft_figure,
)
from vllm_sparse_backend.report.measured import Found
from vllm_sparse_backend.report.page import Inputs, render_html
from vllm_sparse_backend.report.svg import inline
from vllm_sparse_backend.report.verdict import chosen_figures, headline, times, verdict
from vllm_sparse_backend.target import Gpu

MISSING = Found(Path("p.measurement.json"), None, "no measurement beside the profile")


def page(of: Profile, *evaluations: Evaluation, measured: bool = True) -> str:
    found = Found(Path("p.measurement.json"), measurement(of)) if measured else MISSING
    return render_html(Inputs(of, "p.json", found, evaluations))


class _Page(HTMLParser):
    """Which elements there are, and whether they are closed in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_a_whole_page_has_every_part_and_needs_nothing_else() -> None:
    made = profile()
    html = page(made, evaluation(made))
    found = _Page(html)
    assert found.seen["svg"] == 5  # needles, perplexity, heads, curves, TTFT
    assert not found.seen.keys() & {"script", "link", "img", "iframe"}
    assert re.findall(r"https?://[^\s\"'<]+", html.replace("http://www.w3.org/", "")) == []
    for said in (
        "Nothing lost against dense: all 22 answers that dense attention had right are kept",
        "At 8,192 tokens the first token comes 2.00 times as fast (18.0 s dense, 9.0 s sparse).",
        "22 of 22", "+0.20%", "74.1% to 100.0%", "+0.10% to +0.30%", "12.0 s"[:4],
        "dense: 22 of 24", "continue (docs)", "75.0%", "all dense", "the profile",
        "texts a book, some <code> ", "seed 7", "seed 3", "2,048; 8,192 tokens",
        "vllm-sparse eval a-model --profile made-up.json", made.digest, "21 minutes",
    ):  # fmt: skip
        assert said.strip() in found.text, said
    assert "missing" not in re.sub(r"\.missing", "", html)  # nothing is


def test_what_was_not_measured_is_left_out_with_what_would_make_it() -> None:
    bare = _Page(page(profile(), measured=False))
    assert bare.seen["svg"] == 1  # the policies
    for said in (
        "Neither measured nor evaluated", "No evaluation was given. vllm-sparse eval makes one.",
        "Densities are not known: no measurement beside the profile. vllm-sparse calibrate",
        "No curves were measured. vllm-sparse calibrate", "Times were neither measured nor",
    ):  # fmt: skip
        assert said in bare.text, said
    calibrated = _Page(page(profile()))
    assert calibrated.seen["svg"] == 3  # heads, curves, predicted attention
    for said in ("Calibrated, not evaluated", "Times were not measured", "predicted by the cost"):
        assert said in calibrated.text, said
    evaluated = _Page(page(profile(), evaluation(profile()), measured=False))
    assert evaluated.seen["svg"] == 4
    assert "Nothing lost" in evaluated.text and "Densities are not known" in evaluated.text


def test_what_is_predicted_of_a_gpu_says_so() -> None:
    its = measurement(profile())
    predicted = {
        length: row.model_copy(update={"sparse_best": row.sparse / 2})
        for length, row in its.predicted.items()
    }
    target = Gpu("sm_90", 2)
    more = {"isa": target.name, "base": target.base, "whose": target.whose, "predicted": predicted}
    shown = inline(predicted_figure(its.model_copy(update=more)), "p", "Predicted")
    said = " ".join(ElementTree.fromstring(shown).itertext())
    assert "FA3" in said and "seconds of attention, a GPU, never timed" in said
    assert "CPU_ATTN" not in said
    of_cpu = " ".join(
        ElementTree.fromstring(inline(predicted_figure(its), "p", "Predicted")).itertext()
    )
    assert "CPU_ATTN" in of_cpu and "seconds of attention, one thread" in of_cpu
    assert next(iter(predicted.values())).speedup() == "5.0 to 10.0"
    assert next(iter(its.predicted.values())).speedup() == "5.0"


def test_the_page_says_what_was_lost() -> None:
    made = profile()
    found = _Page(page(made, evaluation(made, lost=1, change=2.5)))
    assert (
        "Lost against dense: 2 of 22 answers that dense attention had right, and "
        "perplexity on 1 text by more than 1%." in found.text
    )
    assert "needles, 2048 tokens: dense found the door code, 12345" in found.text
    assert "perplexity rose by 2.50%" in found.text


def test_a_perplexity_that_is_no_number_is_a_loss_and_is_drawn() -> None:
    made = profile()
    broken = evaluation(made, change=math.nan)
    assert "Lost against dense" in verdict(None, [broken])
    assert "nan%" in page(made, broken)


def test_what_models_and_files_say_is_text_and_not_markup() -> None:
    evil = "<script>alert('x')</script>"
    made = profile(name=evil)
    rows = tuple(
        row.model_copy(
            update={
                "task": f"{row.task}{evil}",
                "text": evil,
                "retrieval": row.retrieval and retrieval(lost=1, answer=evil),
            }
        )
        for row in evaluation(made).rows
    )
    html = page(made, evaluation(made, rows=rows, model=evil, texts=(evil,), repeat=evil))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 8


def test_several_evaluations_are_told_apart_and_added_up() -> None:
    made = profile()
    found = _Page(page(made, evaluation(made), evaluation(made, seed=99)))
    assert "dense: 44 of 48" in found.text
    for said in ("Evaluation [1]", "Evaluation [2]", "seed 99", "needles [2]", "44 of 44"):
        assert said in found.text, said


def test_times_of_an_earlier_run_are_told_beside_every_ratio() -> None:
    made = profile()
    ran = evaluation(made, dense_kept=4, dense_times_kept=2)
    said = "2 of 4 dense times are of an earlier run"
    assert f"(18.0 s dense, 9.0 s sparse; {said})." in verdict(None, [ran])
    assert headline(None, None, None, [ran])[0].what.endswith(f"8,192 tokens; {said}")
    assert _Page(page(made, ran)).text.count(said) == 3  # the picture's caption, too
    assert "earlier" not in page(made, evaluation(made))


def test_a_budget_is_drawn_where_it_is_an_error() -> None:
    made = profile()
    for rule, budget, said in (
        ("head", 0.05, "Dotted: the budget of each head (rule head, 0.05)."),
        ("global", 0.05, "Dotted: the budget of the mean of all heads (rule global, 0.05)."),
        ("loss", 0.05, "Dotted: the budget of the mean of all heads, which the model's loss has"),
        ("sale", 0.4, None),
        ("minference", 0.25, None),
    ):
        measured = measurement(made).model_copy(update={"rule": rule, "budget": budget})
        dotted = [
            line
            for axes in curves_figure(measured).axes
            for line in axes.lines
            if np.array_equal(np.asarray(line.get_ydata()), [budget, budget])
        ]
        assert len(dotted) == (0 if said is None else len(LENGTHS)), rule
        text = _Page(render_html(Inputs(made, "p.json", Found(Path("m"), measured, ""), []))).text
        assert "Dotted" not in text if said is None else said in text, rule
        assert f"rule {rule}, budget {budget}" in text


def test_perplexity_is_drawn_of_each_task_and_evaluation() -> None:
    made = profile()
    text = evaluation(made).rows[2]
    short = text.model_copy(update={"length": 2048})
    rows = (short, text, text.model_copy(update={"task": "copy"}))
    ran = evaluation(made, rows=rows)
    alone = [title for title, _ in perplexity_rows([ran])]
    assert alone == ["text (code), 8192 tokens", "copy (code), 8192 tokens"]
    both = [title for title, _ in perplexity_rows([ran, evaluation(made)])]
    assert both == [*(f"{title} [1]" for title in alone), "text (code), 8192 tokens [2]"]


def test_the_sums() -> None:
    made = profile()
    ran = evaluation(made)
    known = times(ran)
    assert [(t.length, t.dense, t.sparse, t.ratio) for t in known] == [
        (2048, 4.5, 2.25, 2.0), (8192, 18.0, 9.0, 2.0),
    ]  # fmt: skip
    chosen = chosen_figures(measurement(made))
    assert list(chosen) == LENGTHS
    heads = [head.figures[8192].density for head in measurement(made).heads]
    assert chosen[8192].density == pytest.approx(sum(heads) / len(heads))
    values = [figure.value for figure in headline(0.25, 8192, measurement(made), [ran])]
    assert values[:4] == ["2.00×", "22 of 22", "+0.20%", "0.250"]
    assert headline(None, None, None, []) == []
    text = ran.rows[2].model_copy(update={"likelihood": likelihood(0.9)})
    assert "rises by no more than 1%" in verdict(None, [ran.model_copy(update={"rows": (text,)})])


def test_pictures_say_what_they_show_and_are_the_same_every_time() -> None:
    made = profile()
    ran, measured = evaluation(made, lost=1), measurement(made)
    for draw, labels in (
        (lambda: needles_figure([ran], "needles"), ("sparse: 20 of 24", "3/4", "90%", "8,192")),
        (lambda: perplexity_figure(perplexity_rows([ran])), ("text (code), 8192 tokens", "change")),
        (lambda: ttft_figure([ran]), ("2.00×", "dense", "sparse", "seconds to the first token")),
        (lambda: curves_figure(measured), ("mass, one threshold", "the profile", "2,048 tokens")),
    ):
        svg = inline(draw(), "x", "a title")
        assert svg == inline(draw(), "x", "a title")
        said = " ".join(ElementTree.fromstring(svg).itertext())
        for label in labels:
            assert label in said, label


def report(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    made = profile()
    path = save_both(tmp_path, made)
    evaluation(made).save(tmp_path / "eval.json")
    target = tmp_path / "page.html"
    done = report("--profile", str(path), "--eval", str(tmp_path / "eval.json"), "-o", str(target))
    assert done.exit_code == 0, done.output
    assert str(target) in done.stderr
    assert _Page(target.read_text()).seen["svg"] == 5
    other = tmp_path / "elsewhere.json"
    measurement_of(path).rename(other)
    done = report("--profile", str(path), "--measurement", str(other), "-o", str(target))
    assert done.exit_code == 0 and "density at 8,192 tokens" in target.read_text()
    done = report("--profile", str(path), "-o", str(target))
    assert done.exit_code == 0 and "no densities: no measurement beside" in done.stderr


def test_files_of_another_profile_and_broken_ones_are_refused(tmp_path: Path) -> None:
    path = save_both(tmp_path, profile())
    other = Profile.build(profile().model, {}, name="other")
    evaluation(other).save(tmp_path / "other.json")
    (tmp_path / "m.json").write_text(measurement(other).model_dump_json())
    (tmp_path / "future.json").write_text(
        evaluation(profile())
        .model_dump_json()
        .replace('"evaluation_schema":1', '"evaluation_schema":2')
    )
    (tmp_path / "broken.json").write_text("{")
    target = tmp_path / "report.html"
    for arguments, message in (
        (["--eval", "other.json"], "made with profile 'other'"),
        (["--eval", "future.json"], "want evaluation_schema 1, got 2"),
        (["--eval", "broken.json"], "not valid JSON"),
        (["--eval", "none.json"], "No such file"),
        (["--measurement", "m.json"], "of profile 'other'"),
        (["--measurement", "none.json"], "No such file"),
        (["-o", "no/such/folder.html"], "-o "),
    ):
        given = [arguments[0], str(tmp_path / arguments[1])]
        done = report("--profile", str(path), "-o", str(target), *given)
        assert done.exit_code == 2, arguments
        assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not target.exists()


@pytest.mark.parametrize("command", ["inspect", "estimate", "report"])
def test_help_teaches_with_an_example(command: str) -> None:
    plain = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner().invoke(app, [command, "--help"], env=plain)
    assert done.exit_code == 0
    assert f"vllm-sparse {command} " in done.output
    assert "Exit status" in done.output and "Examples" in done.output
