"""`vllm-sparse calibrate`, from the text to the profile that a server loads."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _engine import environment
from typer.testing import CliRunner

from vllm_sparse_backend.calibrate.command import calibrate
from vllm_sparse_backend.calibrate.documents import KINDS, QUESTIONS, make_documents
from vllm_sparse_backend.calibrate.results import Measurement, measurement_of, parts_of
from vllm_sparse_backend.cli import app
from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.profile import load_profile
from vllm_sparse_backend.selection import DENSE, Static
from vllm_sparse_backend.tasks.source import Source, read_sources
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
def test_a_killed_calibration_goes_on(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    arguments = command(tiny_llama, words, output, "--documents", "1", "--error", "1")
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + SECONDS
    while not list(parts_of(output).glob("*.safetensors")):
        assert process.poll() is None, "it ended before the first document was finished"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(tiny_llama, words, output, "--error", "1")
    assert done.returncode == 0, done.stderr[-2000:]
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
        (["--theta", "0.4"], "--theta: rule head has no use for it; want --error"),
        (["--rule", "sale", "--error", "0.1"], "--error: rule sale has no use for it"),
        (["--rule", "sale", "--tail-error", "0.1"], "--tail-error: rule sale has no use for it"),
        (["--rule", "minference", "--tail-error", "1"], "--tail-error: rule minference has no use"),
        (["--hf-overrides", "[]"], "--hf-overrides: want a JSON object"),
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
