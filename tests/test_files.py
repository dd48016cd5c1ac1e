"""Files of results on a disk that is full: named, whole or not at all, and what is done stays."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from test_calibrate_rules import part
from test_evaluate_kept import ASKED, OPTIONS, SCORED

from vllm_sparse_backend.calibrate.documents import Document
from vllm_sparse_backend.calibrate.parts import PartsFolder
from vllm_sparse_backend.calibrate.results import Measurement, measurement_of, parts_of
from vllm_sparse_backend.calibrate.rules import Rule
from vllm_sparse_backend.calibrate.run import Model, Progress, Wanted, _key, _starts, calibrate
from vllm_sparse_backend.calibrate.table import Group
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.evaluate.kept import DenseReadings
from vllm_sparse_backend.evaluate.readings import Reading
from vllm_sparse_backend.files import write_whole
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.profile import ModelFacts, load_profile
from vllm_sparse_backend.target import Cpu

MODEL = Model(
    ModelFacts(
        architecture="LlamaForCausalLM", num_layers=2, num_heads=3, num_kv_heads=1, head_dim=64
    ),
    (0, 1),
)
DOCUMENTS = [
    Document(Group(kind, 4096), 0, tuple(range(4095))) for kind in ("copy", "text")
]  # fmt: skip
FULL = "File too large"  # what a limit on the size of files says; a full disk has words of its own


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The kernel refuses what would make a file larger, as it does where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wanted(output: Path) -> Wanted:
    return Wanted(
        EngineOptions("model", 4096), "name", ("text",), (4096,), Rule.HEAD, 0.02, 1.0, 16, 0,
        output, Cpu("avx2"),
    )  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path) -> Wanted:
    """A calibration whose documents are all finished: no engine is started for it."""
    its = wanted(tmp_path / "p.json")
    folder = PartsFolder(parts_of(its.output))
    for seed, document in enumerate(DOCUMENTS):
        folder.save(document.name, _key(its, MODEL, document, "dense"), part(seed, document.group))
    return its


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


PARTS = ["p.parts", "p.parts/copy-4096-0.safetensors", "p.parts/text-4096-0.safetensors"]


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "x.json"
    write_whole(path, "before\n")
    assert path.read_text() == "before\n"
    with (
        no_file_beyond(100),
        pytest.raises(SparsePrefillError, match=rf"x.json: cannot be written \({FULL}\); so"),
    ):
        write_whole(path, "after" * 1000, "; so")
    assert path.read_text() == "before\n" and names(path.parent) == ["x.json"]
    path.unlink()
    path.mkdir()
    with pytest.raises(SparsePrefillError, match=r"x.json: cannot be written \(Is a directory\)"):
        write_whole(path, "after")
    assert names(path.parent) == ["x.json"]


@pytest.mark.parametrize("which", ["profile", "measurement"])
def test_a_calibration_that_cannot_be_written_is_named(measured: Wanted, which: str) -> None:
    output = measured.output
    calibrate(measured, MODEL, DOCUMENTS, Progress())
    made = {"profile": output, "measurement": measurement_of(output)}
    assert made["profile"].stat().st_size < made["measurement"].stat().st_size
    limit = made[which].stat().st_size - 1
    for path in made.values():
        path.unlink()
    with (
        no_file_beyond(limit),
        pytest.raises(SparsePrefillError, match=rf"{made[which].name}: cannot be .*{FULL}") as end,
    ):
        calibrate(measured, MODEL, DOCUMENTS, Progress())
    assert f"the finished documents stay in {parts_of(output)}" in str(end.value)
    written = ["p.json"] if which == "measurement" else []
    assert names(output.parent) == [*written, *PARTS], "nothing is left half-written"
    # The same command goes on from there: all documents are finished, and there is no such model.
    profile, found = calibrate(measured, MODEL, DOCUMENTS, Progress())
    assert load_profile(output) == profile
    assert Measurement.model_validate_json(made["measurement"].read_text()) == found


def test_a_document_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    group = Group("text", 4096)
    folder = PartsFolder(tmp_path / "p.parts")
    folder.save("a", "key", part(1, group))
    size = (folder.folder / "a.safetensors").stat().st_size
    with (
        no_file_beyond(size // 2),
        pytest.raises(SparsePrefillError, match=r"b.safetensors: cannot be written \(.*; the doc"),
    ):
        folder.save("b", "key", part(2, group))
    assert names(folder.folder) == ["a.safetensors"]
    assert folder.load("a", "key", group) is not None


def test_a_reading_that_cannot_be_written_leaves_the_others(tmp_path: Path) -> None:
    readings = DenseReadings(tmp_path / "dense", OPTIONS)
    readings.save("needles-0", ASKED, Reading(answers=("a",), ttft=1.5))
    with (
        no_file_beyond(300),
        pytest.raises(SparsePrefillError, match=rf"text-0.json: cannot be written \({FULL}\)") as e,
    ):
        readings.save("text-0", SCORED, Reading(losses=(1.0,) * 100))
    assert f"stays in {tmp_path / 'dense'}, and the same command goes on" in str(e.value)
    assert names(tmp_path) == ["dense", "dense/needles-0.json"]
    assert readings.load("needles-0", ASKED) is not None


ON_A_FULL_DISK = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_calibrate_rules import part
from test_evaluate_kept import OPTIONS, SCORED
from vllm_sparse_backend.calibrate.parts import PartsFolder
from vllm_sparse_backend.calibrate.table import Group
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.evaluate.kept import DenseReadings
from vllm_sparse_backend.evaluate.readings import Reading
from vllm_sparse_backend.files import write_whole

disk, group = Path(sys.argv[1]), Group("text", 4096)
folder, said, done = PartsFolder(disk / "p.parts"), [], 0
reading = Reading(losses=(1.0,) * 100_000)
try:
    for number in range(100):
        folder.save(f"text-4096-{number}", "key", part(number, group))
        done += 1
except SparsePrefillError as error:
    said.append(str(error))
for write in (
    lambda: DenseReadings(disk / "dense", OPTIONS).save("text-0", SCORED, reading),
    lambda: write_whole(disk / "p.measurement.json", "x" * 300_000),
):
    try:
        write()
    except SparsePrefillError as error:
        said.append(str(error))
loaded = sum(folder.load(f"text-4096-{n}", "key", group) is not None for n in range(100))
files = sorted(path.name for path in disk.rglob("*") if path.is_file())
print(json.dumps({"done": done, "loaded": loaded, "said": said, "files": files}))
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, of 400 KB, which no other process sees."""
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    tried = [*mount, "mount", "-t", "tmpfs", "-o", "size=400k", "none", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(tried, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    script = tmp_path.with_name("full.py")
    script.write_text(ON_A_FULL_DISK)
    command = f'{" ".join(tried[len(mount) :])} && exec "$0" "$@"'
    done = subprocess.run(
        [*mount, "sh", "-c", command, sys.executable, str(script), str(tmp_path),
         str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["done"] == found["loaded"] < 100
    assert len(found["said"]) == 3
    for said in found["said"]:
        assert "cannot be written" in said and "No space left on device" in said
    assert found["files"] == sorted(f"text-4096-{n}.safetensors" for n in range(found["done"]))


def test_what_is_measured_is_in_the_key(tmp_path: Path) -> None:
    its, document = wanted(tmp_path / "p.json"), DOCUMENTS[1]

    def key(**more: int) -> str:
        return _key(replace(its, **more), MODEL, document, "dense")  # type: ignore[arg-type]

    def of(blocks: int, seed: int, chunk: int = 2048, tokens: int = 4095) -> list[int]:
        options = replace(its.options, chunk_tokens=chunk)
        asked = replace(its, options=options, blocks=blocks, seed=seed)
        return _starts(asked, replace(document, token_ids=tuple(range(tokens))))

    assert key() == key(seed=0) == key(blocks=16)
    assert len({key(), key(seed=1), key(blocks=15)}) == 3
    assert of(16, 0) == of(16, 0, chunk=1024) != of(16, 1)
    assert len(of(16, 0)) == 16 and len(of(3, 0)) == 3 and of(16, 0)[-1] == 4032
    # A last step of three rows is dense in a server, and so never seen.
    assert of(16, 0, tokens=4099)[-1] == 4032 and of(16, 0, chunk=4096, tokens=4163)[-1] == 4160
