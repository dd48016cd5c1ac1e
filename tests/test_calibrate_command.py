"""`vllm-sparse calibrate`, from the text to the profile that a server loads."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _engine import environment
from safetensors import safe_open
from typer.testing import CliRunner

from vllm_sparse_backend.calibrate.command import _bar, _lengths, calibrate
from vllm_sparse_backend.calibrate.documents import KINDS, QUESTIONS, make_documents
from vllm_sparse_backend.calibrate.parts import PartsFolder
from vllm_sparse_backend.calibrate.results import Measurement, measurement_of, parts_of
from vllm_sparse_backend.calibrate.table import Group, Part
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import load_profile
from vllm_sparse_backend.selection import DENSE, Static
from vllm_sparse_backend.tasks.source import Source, names_of, read_sources
from vllm_sparse_backend.tasks.stream import TokenStream

LENGTH = 2304
SECONDS = 560

runner = CliRunner()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for `tiny_llama`, whose words are w3 to w511."""
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{rng.randrange(3, 512)}" for _ in range(4500)))
    return path


def command(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("vllm-sparse")), "calibrate", str(model),
        "--text", str(text), "--lengths", str(LENGTH), "--no-retrieval", "-o", str(output),
        "--dtype", "float32", *more,
    ]  # fmt: skip


def run(
    model: Path, text: Path, output: Path, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, text, output, *more),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def calibrated(
    tiny_llama: Path, words: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    output = tmp_path_factory.mktemp("calibrated") / "profile.json"
    # vLLM's log is not to be in the JSON.
    more = {"VLLM_LOGGING_LEVEL": "INFO"}
    return output, run(tiny_llama, words, output, "--error", "0.05", "--json", **more)


def test_a_profile_with_its_measurement(
    calibrated: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    output, done = calibrated
    assert done.returncode == 0, done.stderr[-2000:]
    profile = load_profile(output)
    measurement = Measurement.model_validate_json(measurement_of(output).read_text())
    assert json.loads(done.stdout) == json.loads(measurement.model_dump_json())
    assert measurement.digest == profile.digest
    assert measurement.kinds == ["copy", "text"]
    assert profile.calibration is not None
    assert profile.calibration.lengths == [LENGTH]
    assert profile.calibration.texts == ["words.txt"]
    assert profile.defaults == DENSE, "what was not measured is not approximated"
    assert len(measurement.heads) == 2 * 4
    for head in measurement.heads:
        assert head.policy == profile.for_layer(head.layer)[head.head]
        assert head.figures[LENGTH].error <= 0.05
        assert 0 < head.figures[LENGTH].density <= 1


def test_another_budget_reads_nothing_again(
    calibrated: tuple[Path, subprocess.CompletedProcess[str]], tiny_llama: Path, words: Path
) -> None:
    output, _ = calibrated
    other = output.with_name("other.json")
    parts_of(output).rename(parts_of(other))
    done = run(tiny_llama, words, other, "--error", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_profile(other).kinds() == {DENSE}
    assert "Loading" not in done.stderr and "NUMA" not in done.stderr, "no engine was started"


def test_another_target_weighs_what_was_measured_anew(
    calibrated: tuple[Path, subprocess.CompletedProcess[str]],
    tiny_llama: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    output, _ = calibrated
    output_for_gpu = tmp_path / "gpu.json"
    measured = next(output.parent.glob("*.parts"))
    shutil.copytree(measured, parts_of(output_for_gpu))
    done = run(tiny_llama, words, output_for_gpu, "--error", "0.05", "--target", "sm_90")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Loading" not in done.stderr and "NUMA" not in done.stderr, "no engine was started"
    assert "one H100 (sm_90), PREDICTED and never timed on hardware" in done.stdout
    assert "x FA3" in done.stdout and "CPU_ATTN" not in done.stdout
    made = Measurement.model_validate_json(measurement_of(output_for_gpu).read_text())
    assert (made.isa, made.base) == ("sm_90", "FA3")
    predicted = made.predicted[LENGTH]
    assert predicted.sparse_best is not None
    assert 0 < predicted.sparse_best < predicted.sparse < predicted.keep_all
    profile = load_profile(output_for_gpu)
    assert profile.calibration is not None and profile.calibration.note is not None
    assert profile.calibration.note.endswith(
        "attention_speedup: the worse end of what is predicted, against FA3, for one H100 (sm_90), "
        "PREDICTED and never timed on hardware"
    )
    for head in made.heads:
        assert head.figures[LENGTH].error <= 0.05


def test_the_same_seed_gives_the_same_file(
    calibrated: tuple[Path, subprocess.CompletedProcess[str]],
    tiny_llama: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    again = tmp_path / "profile.json"
    done = run(tiny_llama, words, again, "--error", "0.05")
    assert done.returncode == 0, done.stderr[-2000:]
    assert again.read_bytes() == calibrated[0].read_bytes()
    assert "tokens" in done.stdout and "2,304" in done.stdout


@pytest.mark.all
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_calibration_goes_on(
    tiny_llama: Path, words: Path, tmp_path: Path, how: signal.Signals
) -> None:
    output = tmp_path / "profile.json"
    arguments = command(tiny_llama, words, output, "--documents", "1", "--error", "1")
    process = subprocess.Popen(
        arguments,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # Who starts tests in the background has it ignored, and it would be so in there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + SECONDS
    while not list(parts_of(output).glob("*.safetensors")):
        assert process.poll() is None, "it ended before the first document was finished"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=SECONDS)
    if how == signal.SIGINT:
        assert process.returncode == 130, said[-2000:]
        assert f"what was measured stays in {parts_of(output)}" in said
    assert not output.exists() and not list(parts_of(output).glob("*.new"))
    finished = {path: path.stat().st_mtime_ns for path in parts_of(output).iterdir()}
    assert len(finished) == 1, "the second document was not read"
    done = run(tiny_llama, words, output, "--error", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    both = {path: path.stat().st_mtime_ns for path in parts_of(output).iterdir()}
    assert len(both) == 2 and finished.items() <= both.items(), "nor the first one again"
    assert load_profile(output).kinds() == {Static(local=256)}, "as little as there is"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--lengths", "1024"],
            "want at least 2304, below which hardly anything is sparse, got 1024",
        ),
        (["--lengths", "16384"], "the model has 8192 positions, got 16384"),
        (["--lengths", "4096,x"], "want numbers with commas between them, got '4096,x'"),
        (["--lengths", "8192"], "words.txt: want 8191 tokens"),
        (["--text", "nowhere"], "text nowhere: No such file or directory"),
        (["--target", "sm_75"], "--target: want one of avx512_bf16, "),
        (["--theta", "0.4"], "--theta: rule head has no use for it; want --error"),
        (["--rule", "sale", "--error", "0.1"], "--error: rule sale has no use for it"),
        (["--rule", "sale", "--tail-error", "0.1"], "--tail-error: rule sale has no use for it"),
        (["--rule", "minference", "--tail-error", "1"], "--tail-error: rule minference has no use"),
        (["--hf-overrides", "[]"], "--hf-overrides: want a JSON object"),
        (["--error", "1.5"], "--error: want a number from 0 to 1, got 1.5"),
        (["--error", "nan"], "--error: want a number from 0 to 1, got nan"),
        (["--tail-error", "nan"], "--tail-error: want a number from 0 on, got nan"),
        (["--tail-error", "inf"], "--tail-error: want a number from 0 on, got inf"),
        (["--rule", "sale", "--theta", "nan"], "--theta: want a number from 0 on, got nan"),
        (["--rule", "minference", "--work", "nan"], "--work: want a number from 0 to 1, got nan"),
        (["-o", "."], "--output: want a file, got ., a folder"),
        (["-o", "/dev/null"], "--output: want a regular file, got /dev/null"),
        (["-o", "/proc/p.json"], "--output /proc/p.json: want a folder to write in, got /proc"),
        (["-o", "nowhere/p.parts"], "--output nowhere/p.parts: want another ending than .parts"),
    ],
)
def test_wrong_input_is_named_before_anything_starts(
    tiny_llama: Path, words: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    output = tmp_path / "p.json"
    given = [str(tiny_llama), "--text", str(words), "--no-retrieval", "-o", str(output)]
    result = runner.invoke(app, ["calibrate", *given, *arguments])
    assert result.exit_code == 2, result.output
    assert said in result.output.replace("\n", " ")
    assert not output.exists()


def test_what_will_be_written_beside_the_profile_is_looked_at_first(
    words: Path, tmp_path: Path
) -> None:
    output = tmp_path / "p.json"
    arguments = ["calibrate", "no-model", "--text", str(words), "-o", str(output)]
    for beside, said in (
        (measurement_of(output), "p.measurement.json, a folder"),
        (parts_of(output), "p.parts (Not a directory)"),
    ):
        beside.mkdir() if beside.suffix == ".json" else beside.touch()
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2 and said in result.output.replace("\n", ""), result.output
        beside.rmdir() if beside.is_dir() else beside.unlink()


def test_lengths_that_are_not_named_are_as_far_as_the_model_goes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _lengths(None, 131072) == _lengths(None, 8192) == [4096, 8192]
    assert capsys.readouterr().err == ""
    for positions, lengths in ((4096, [4096]), (5000, [4096, 5000]), (3000, [3000])):
        assert _lengths(None, positions) == lengths
        said = ",".join(map(str, lengths))
        assert f"--lengths: {said}, since the model has {positions} pos" in capsys.readouterr().err
    with pytest.raises(Refused, match="the model has 2048 positions; want at least 2304"):
        _lengths(None, 2048)
    with pytest.raises(Refused, match="the model has 4096 positions, got 8192"):
        _lengths("4096,8192", 4096)


def test_texts_are_known_by_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("some text")
    monkeypatch.chdir(tmp_path / "notes")
    for given, name in ((".", "notes"), ("a.txt", "a.txt"), ("..", tmp_path.name)):
        assert names_of(read_sources([Path(given)])) == (name,)
    assert names_of(read_sources()) == ("Python's help topics", "Python's standard library")


def test_the_bar_reaches_its_end_whatever_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with _bar(2) as progress:
        progress.document("short last chunk", 6, reused=False)
        for _ in range(4):
            progress.advance()
        progress.finished()
        progress.document("of an earlier run", 6, reused=True)
    assert "2/2" in capsys.readouterr().err


def test_measured_once_more_behind_itself(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    """And with a last chunk of nine rows, which a server computes densely."""
    output, group = tmp_path / "profile.json", Group("text", 2310)
    more = ["--lengths", "2310", "--chunk-tokens", "2300", "--no-copies", "--error", "1"]
    done = run(tiny_llama, words, output, *more, "--as-served")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2/2" in done.stderr, "of two passes over one document"
    parts = {path.stem: path for path in parts_of(output).iterdir()}
    assert parts.keys() == {"text-2310-0", "served-text-2310-0"}
    dense, served = (_sums(parts[name], group) for name in ("text-2310-0", "served-text-2310-0"))
    # Nothing comes before the first layer; the second sees what the first has lost.
    np.testing.assert_array_equal(dense.error[0][0], served.error[0][0])
    assert (dense.size[0] == served.size[0]).all() and (dense.size[1] != served.size[1]).any()
    # Sixteen blocks, the last of them the last before the short chunk, which it ends in.
    assert dense.rows.sum() == 15 * 64 + 2300 % 64
    profile = load_profile(output)
    assert Measurement.model_validate_json(measurement_of(output).read_text()).digest == (
        profile.digest
    )
    again = run(tiny_llama, words, output, *more, "--as-served")
    assert again.returncode == 0 and "NUMA" not in again.stderr, "no engine was started"
    assert load_profile(output) == profile


def _sums(path: Path, group: Group) -> Part:
    with safe_open(path, framework="numpy") as file:
        key = (file.metadata() or {})["key"]
    found = PartsFolder(path.parent).load(path.stem, key, group)
    assert found is not None
    return found


def test_no_text_and_no_model_are_named(words: Path, tmp_path: Path) -> None:
    assert runner.invoke(app, ["calibrate", "model"]).exit_code == 2
    (tmp_path / "empty").mkdir()
    result = runner.invoke(app, ["calibrate", str(tmp_path / "empty"), "--text", str(words)])
    assert result.exit_code == 2 and "no config.json" in result.output


def test_a_model_without_sparse_layers_is_named(
    tiny_llama: Path, words: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_llama, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "head_dim": 48}))
    done = run(odd, words, tmp_path / "p.json")
    assert done.returncode == 2
    assert "want layers that can be sparse, got none: head_dim (2)" in done.stderr
    # Overrides make another model of it, before anything is read.
    overridden = run(odd, words, tmp_path / "p.json", "--hf-overrides", '{"head_dim": 40}')
    assert overridden.returncode == 2
    assert "want layers that can be sparse, got none: head_dim (2)" in overridden.stderr


def test_help_teaches() -> None:
    text = runner.invoke(app, ["calibrate", "--help"]).output
    assert calibrate.__doc__ is not None
    for part in ("--error", "--rule", "--theta", "--as-served", "Examples:", "Exit status:"):
        assert part in text


def test_documents_are_of_their_length_and_kind(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    stream = TokenStream(AutoTokenizer.from_pretrained(smollm2), read_sources()[0])
    documents = make_documents([stream], KINDS, [2048, 4096], 2, seed=1)
    assert [d.group.length for d in documents] == [4096] * 6 + [2048] * 6, "the longest first"
    assert len({d.name for d in documents}) == 12
    for document in documents:
        room = document.group.length - 1
        if document.group.kind == "records":
            assert room - QUESTIONS < len(document.token_ids) <= room
            text = stream.tokenizer.decode(document.token_ids[room - QUESTIONS :])
            assert text.count(":") >= 4, "asked for, with the answers"
        else:
            assert len(document.token_ids) == room
    assert documents == make_documents([stream], KINDS, [2048, 4096], 2, seed=1)
    assert documents != make_documents([stream], KINDS, [2048, 4096], 2, seed=2)


def test_a_short_text_is_named(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    source = Source("text", ("a few words " * 100,), ("notes.txt",))
    stream = TokenStream(AutoTokenizer.from_pretrained(smollm2), source)
    with pytest.raises(TextError, match=r"notes\.txt: want 4095 tokens"):
        make_documents([stream], KINDS, [4096], 1, seed=0)
