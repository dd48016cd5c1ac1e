"""What the commands share: how they read options and how they refuse."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer

from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXTRAS,
    Refused,
    check_output,
    errors_named,
    json_object,
    parse_lengths,
    parse_names,
)


def test_lengths() -> None:
    assert parse_lengths("8192,4096, 4096") == [4096, 8192]
    for text in ("", "4096,", "many", "0", "-1,5", "4k"):
        with pytest.raises(Refused, match=r"--of: want numbers with commas between them, got"):
            parse_lengths(text, "--of")


def test_names() -> None:
    known = ["a", "b", "c-d"]
    assert parse_names("all", known) == (known, set())
    assert parse_names("c-d, a,a", known) == (["c-d", "a"], {"a", "c-d"})
    assert parse_names("b,all,-a", known) == (["b", "c-d"], {"b"})
    assert parse_names("-a,a,b", known) == (["b"], {"b"})
    for text, got in (("d", "d"), ("all,-d", "-d"), ("", ""), ("-a", "-a"), ("all,-all", "-all")):
        with pytest.raises(Refused, match=rf"--of: want all or some of a, b, c-d, got '{got}'"):
            parse_names(text, known, "--of")


def test_json_objects() -> None:
    assert json_object(None, "--x") is None
    assert json_object('{"a": 1}', "--x") == {"a": 1}
    for text, said in (("{", "want JSON"), ("[1]", "want a JSON object"), ("1", "want a JSON")):
        with pytest.raises(Refused, match=f"--x: {said}"):
            json_object(text, "--x")


def _missing(module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SparsePrefillError("the thing"), EXIT_FAILED, "error: the thing\n"),
        (Refused("the option"), EXIT_FAILED, "error: the option\n"),
        (
            FileNotFoundError(2, "No such file", "x.json"),
            EXIT_FAILED,
            "error: x.json: No such file\n",
        ),
        (_missing("jinja2"), EXIT_FAILED, "named 'jinja2'; want it installed: pip install"),
        (_missing("rich"), EXIT_FAILED, "pip install 'vllm-sparse-backend[demo]'\n"),
        (_missing("pandas"), EXIT_FAILED, "pip install 'vllm-sparse-backend[loadtest]'\n"),
        (_missing("vllm"), EXIT_FAILED, "[cpu]', or 'vllm-sparse-backend[cuda]' for GPUs"),
        (_missing("safetensors"), EXIT_FAILED, "want it installed: pip install safetensors\n"),
        (_missing("vllm.no_such"), EXIT_FAILED, "the traceback above says where\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "cut off\n"),
        (ZeroDivisionError("a bug"), EXIT_FAILED, "ZeroDivisionError: a bug"),
    ],
)
def test_errors_become_a_message_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end, errors_named("cut off"):
        raise error
    assert end.value.exit_code == status
    shown = capsys.readouterr()
    assert said in shown.err
    assert not shown.out


def test_every_package_of_an_extra_is_told_with_it() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    modules = {"pyyaml": "yaml"}
    for extra in ("demo", "loadtest"):
        packages = {re.split(r"[^\w-]", line)[0] for line in extras[extra]} - {"numpy"}
        assert {modules.get(name, name) for name in packages} <= set(EXTRAS[extra])
    # An extra that brings vLLM would put its build over the one that is there.
    assert EXTRAS.keys() <= extras.keys() - {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (".", "want a file, got ., a folder"),
        ("..", "want a file, got .., a folder"),
        ("/", "want a file, got /, a folder"),
        ("", "want a file, got ., a folder"),
        ("/dev/null", "want a regular file, got /dev/null, which is something else"),
        ("/proc/none/p.json", "want a folder to write in, got /proc "),
        ("file/p.json", "want a folder to write in, got .*file .Not a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(Refused, match=f"--out.*{said}"):
        check_output(Path(given), "--out")
    assert list(Path().iterdir()) == [Path("file")]


def test_outputs_that_can_be_written(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("before")
    for path in (there, tmp_path / "new.json", tmp_path / "no" / "folder" / "yet.json"):
        check_output(path)
    assert there.read_text() == "before" and list(tmp_path.iterdir()) == [there]


def test_exits_and_usage_errors_pass_through() -> None:
    with pytest.raises(typer.Exit) as end, errors_named():
        raise typer.Exit(1)
    assert end.value.exit_code == 1
    with pytest.raises(typer.BadParameter), errors_named():
        raise typer.BadParameter("usage")
