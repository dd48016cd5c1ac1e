"""Counters from the worker's file to /metrics and the last line, across real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from vllm_sparse_backend.backend.plan import DenseReason
from vllm_sparse_backend.metrics import Counters, read_totals
from vllm_sparse_backend.metrics.counters import (
    ATTEND,
    CAUSAL,
    COMPUTED,
    DENSE_ESTIMATE,
    KEPT,
    LAYER_TILES,
    SELECT,
    SPARSE,
    decisions,
    dense,
)
from vllm_sparse_backend.metrics.prometheus import INFO_LABELS, Collector

INFO = {"isa": "avx2", "profile": 'a "name" \\ of\nmine', "digest": "sha256:0", "version": "0"}
REASONS = [str(reason) for reason in DenseReason]


def scrape(directory: Path) -> dict[tuple[str, tuple[str, ...]], float]:
    """What a Prometheus server would read: by sample name and label values in order."""
    registry = CollectorRegistry()
    registry.register(Collector(directory))
    return samples_of(registry)


def samples_of(registry: CollectorRegistry) -> dict[tuple[str, tuple[str, ...]], float]:
    """What a registry exports, read back."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_add_up_and_are_read_at_any_time(tmp_path: Path) -> None:
    own = Counters(tmp_path, REASONS, INFO)
    totals = read_totals(tmp_path)
    assert set(totals.values.values()) == {0.0}
    assert len(totals.values) == 2 * (2 + len(REASONS)) + 5
    assert totals.infos == [INFO]
    assert totals.summary() == "no tokens were computed"
    own.add(SPARSE, 3)
    own.add(SPARSE, 2**52)
    own.add(dense("decode"), 7)
    own.add(SELECT, 0.25)
    values = read_totals(tmp_path).values
    assert values[SPARSE] == 2**52 + 3
    assert values[dense("decode")] == 7
    assert values[SELECT] == 0.25
    with pytest.raises(KeyError):
        own.add(dense("because"), 1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".counters"]


def test_one_process_may_have_several_engines(tmp_path: Path) -> None:
    first, second = (Counters(tmp_path, REASONS, INFO) for _ in range(2))
    first.add(SPARSE, 1)
    second.add(SPARSE, 2)
    assert read_totals(tmp_path).values[SPARSE] == 3


def test_tiles_of_heads_are_the_whole_models_whoever_counts_them(tmp_path: Path) -> None:
    ranks = [Counters(tmp_path, REASONS, INFO, shape=(3, 4)) for _ in range(2)]
    for rank, own in enumerate(ranks):
        cells = 4 + 2 * rank + np.arange(2)  # two heads each of layer 1
        for _ in range(2):
            own.add_tiles(0, cells, np.array([1, 2]))
            own.add_tiles(1, cells, np.array([10, 10**13]))
    totals = read_totals(tmp_path)
    assert totals.workers == 2 and totals.unreadable == 0
    assert totals.tiles[0].tolist() == [[0] * 4, [2, 4, 2, 4], [0] * 4]
    assert totals.tiles[1, 1].tolist() == [20, 2 * 10**13] * 2
    assert dict(totals.of(LAYER_TILES))[("1", "causal")] == 40 + 4 * 10**13
    # Another engine of the process, with a model of another shape.
    Counters(tmp_path, REASONS, INFO, shape=(1, 9)).add_tiles(0, np.array([8]), np.array([5]))
    tiles = read_totals(tmp_path).tiles
    assert tiles.shape == (2, 3, 9)
    assert tiles[0, 0, 8] == 5 and tiles[0, 1].sum() == 12


def test_heads_that_nobody_counts_take_no_space(tmp_path: Path) -> None:
    own = Counters(tmp_path, REASONS, INFO, shape=(1024, 1024))
    own.add_tiles(1, np.array([1024 * 1024 - 1]), np.array([1]))
    status = own.path.stat()
    assert status.st_size > 16 << 20
    assert status.st_blocks * 512 < 1 << 20
    assert read_totals(tmp_path).tiles[1, 1023, 1023] == 1


def test_a_header_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="header: want at most 8192 bytes, got"):
        Counters(tmp_path, REASONS, {"profile": "x" * 9000})


WORKER = """
import sys, os, signal
from pathlib import Path
import numpy as np
from vllm_sparse_backend.metrics import Counters
from vllm_sparse_backend.metrics.counters import SPARSE, COMPUTED
number = int(sys.argv[2])
own = Counters(Path(sys.argv[1]), ["decode"], {"isa": f"isa{number % 2}", "profile": "p",
                                               "digest": "d", "version": "0"}, shape=(2, 3))
for _ in range(1000):
    own.add_tiles(0, np.array([4]), np.array([number]))
    own.add(SPARSE, number)
    own.add(COMPUTED, 0.5)
os.kill(os.getpid(), signal.SIGKILL)  # what was counted outlives a worker that is killed
"""


def test_several_processes_one_of_which_after_another_is_killed(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(number)])
        for number in (1, 2, 3)
    ]
    while any(worker.poll() is None for worker in workers):
        read_totals(tmp_path)  # at any time
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 3
    totals = read_totals(tmp_path)
    assert totals.values[SPARSE] == 6000
    assert totals.values[COMPUTED] == 1500
    assert totals.tiles[0].tolist() == [[0, 0, 0], [0, 6000, 0]]
    assert sorted(info["isa"] for info in totals.infos) == ["isa0", "isa1"]


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    own = Counters(tmp_path, ["decode"], INFO)
    own.add(SPARSE, 5)
    whole = own.path.read_bytes()
    for i, content in enumerate(
        (
            b"",
            whole[:100],
            whole[:-8],
            whole[:-3],
            whole + bytes(8),
            b"[]".ljust(8192),
            b"{}".ljust(8192),
        )
    ):
        (tmp_path / f"{i}.counters").write_bytes(content)
    (tmp_path / "folder.counters").mkdir()
    totals = read_totals(tmp_path)
    assert totals.values[SPARSE] == 5
    assert totals.infos == [INFO]
    assert read_totals(tmp_path / "none").values == {}


def test_metrics_as_prometheus_reads_them(tmp_path: Path) -> None:
    assert scrape(tmp_path) == {}
    expected = {"4096": 0.43, "8192": 0.35}
    own = Counters(tmp_path, REASONS, INFO, shape=(2, 3), expected=expected)
    own.add_tiles(0, np.array([3, 5]), np.array([4, 5]))
    own.add_tiles(1, np.array([3, 5]), np.array([40, 50]))
    own.add(SPARSE, 12)
    own.add(decisions(SPARSE), 3)
    own.add(DENSE_ESTIMATE, 4.5)
    own.add(KEPT, 6)
    own.add(dense("decode"), 5)
    for key, amount in ((COMPUTED, 30), (CAUSAL, 100), (SELECT, 0.5), (ATTEND, 1.5)):
        own.add(key, amount)
    samples = scrape(tmp_path)
    assert (
        samples.pop(("vllm:sparse_prefill_info", tuple(INFO[name] for name in sorted(INFO_LABELS))))
        == 1
    )
    name = "vllm:sparse_prefill_layer_tokens_total"
    assert samples.pop((name, ("sparse", ""))) == 12
    assert samples.pop((name, ("keep_all", "short_context"))) == 6
    of_decisions = "vllm:sparse_prefill_layer_decisions_total"
    assert samples.pop((of_decisions, ("sparse", ""))) == 3
    assert samples.pop((of_decisions, ("keep_all", "short_context"))) == 0
    for reason in REASONS:
        assert samples.pop((of_decisions, ("dense", reason))) == 0
    of_layers = "vllm:sparse_prefill_layer_tiles_total"
    for kind, of_layer in (("computed", [0, 9]), ("causal", [0, 90])):
        assert [samples.pop((of_layers, (kind, str(n)))) for n in range(2)] == of_layer
    for tokens, density in expected.items():
        assert samples.pop(("vllm:sparse_prefill_profile_density", (tokens,))) == density
    assert samples.pop((name, ("dense", "decode"))) == 5
    for reason in set(REASONS) - {"decode"}:
        assert samples.pop((name, ("dense", reason))) == 0
    assert samples == {
        ("vllm:sparse_prefill_tiles_total", ("computed",)): 30,
        ("vllm:sparse_prefill_tiles_total", ("causal",)): 100,
        ("vllm:sparse_prefill_seconds_total", ("select",)): 0.5,
        ("vllm:sparse_prefill_seconds_total", ("attend",)): 1.5,
        ("vllm:sparse_prefill_dense_estimate_seconds_total", ()): 4.5,
    }


MIRRORED = """
import sys
from pathlib import Path
import numpy as np
from vllm_sparse_backend.metrics import Counters
from vllm_sparse_backend.metrics.counters import (
    ATTEND, CAUSAL, COMPUTED, DENSE_ESTIMATE, KEPT, SELECT, SPARSE, decisions, dense)
from vllm_sparse_backend.metrics.prometheus import mirror_if_needed
info = {"isa": "avx2", "profile": "p", "digest": "d", "version": "0"}
expected = {"4096": 0.5}
mirror = mirror_if_needed(info, expected)
assert mirror is not None
reasons = ["decode", "sinks"]
own = Counters(Path(sys.argv[1]), reasons, info, mirror, shape=(3, 4), expected=expected)
for key in (SPARSE, KEPT, dense("decode")):
    own.add(key, 3)
    own.add(decisions(key), 2)
for key in (ATTEND, CAUSAL, COMPUTED, DENSE_ESTIMATE, SELECT):
    own.add(key, 1.5)
for kind in range(2):
    own.add_tiles(kind, np.array([1, 5, 6]), np.array([1, 2, 3]) + kind)
    own.add_tiles(kind, np.array([3]), np.array([7]))
"""


def test_several_api_servers_see_what_one_would(tmp_path: Path) -> None:
    files, ours = tmp_path / "multiprocess", tmp_path / "session"
    for folder in (files, ours):
        folder.mkdir()
    for _ in range(2):  # workers that are gone by the time of the scrape
        subprocess.run(
            [sys.executable, "-c", MIRRORED, str(ours)],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(files)},
            check=True,
        )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(files))
    mirrored = samples_of(registry)
    assert scrape(ours) == mirrored  # what was never counted is there, too
    assert mirrored[("vllm:sparse_prefill_layer_tokens_total", ("dense", "sinks"))] == 0
    assert mirrored[("vllm:sparse_prefill_layer_tiles_total", ("causal", "0"))] == 2 * (2 + 7)
    assert mirrored[("vllm:sparse_prefill_layer_tiles_total", ("computed", "1"))] == 2 * 5
    assert mirrored[("vllm:sparse_prefill_profile_density", ("4096",))] == 0.5


def test_the_last_line(tmp_path: Path) -> None:
    own = Counters(tmp_path, REASONS, INFO)
    own.add(dense("decode"), 10)
    own.add(dense("short_context"), 30)
    assert read_totals(tmp_path).summary() == (
        "0.0% of 40 layer tokens sparse; dense: short_context 75.0%, decode 25.0%"
    )
    own.add(SPARSE, 60)
    for key, amount in ((COMPUTED, 25), (CAUSAL, 100), (SELECT, 0.52), (ATTEND, 1.5)):
        own.add(key, amount)
    assert read_totals(tmp_path).summary() == (
        "60.0% of 100 layer tokens sparse (density 0.250, 0.5 thread seconds selecting, "
        "1.5 attending); dense: short_context 30.0%, decode 10.0%"
    )


SESSION = """
import logging, multiprocessing, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from vllm_sparse_backend.metrics import Counters, open_session
from vllm_sparse_backend.metrics.counters import SPARSE

def worker(wanted):
    found = open_session()
    assert found == wanted, (found, wanted)
    Counters(found, ["decode"], {"isa": "x"}).add(SPARSE, 10)

if __name__ == "__main__":
    directory = open_session()
    assert open_session() == directory
    assert directory.stat().st_mode & 0o777 == 0o700
    print(directory, flush=True)
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=worker, args=(directory,))
    child.start()
    child.join()
    assert child.exitcode == 0 and directory.is_dir()
    if sys.argv[1:] == ["wait"]:
        sys.stdin.read()
"""


def session(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    script = tmp_path / "session.py"
    script.write_text(SESSION)
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_session_is_shared_summed_up_and_removed(tmp_path: Path) -> None:
    out, _ = (server := session(tmp_path)).communicate()
    assert server.returncode == 0
    directory, summary = out.splitlines()
    assert summary.endswith("sparse_prefill: 100.0% of 10 layer tokens sparse")
    assert not Path(directory).exists()


def test_stale_directories_are_removed_and_live_ones_are_not(tmp_path: Path) -> None:
    killed, living = (session(tmp_path, "wait") for _ in range(2))
    directories = []
    for server in (killed, living):
        assert server.stdout is not None
        directories.append(Path(server.stdout.readline().strip()))
        while not list(directories[-1].glob("*.counters")):
            time.sleep(0.05)
    stale, live = directories
    killed.kill()
    killed.wait()
    # A server that was started by hand from within another does not enter its session.
    within, _ = session(tmp_path, SPARSE_PREFILL_SESSION=str(live)).communicate()
    assert re.match(str(tmp_path), within)
    assert within.splitlines()[0] != str(live)
    assert stale.is_dir()  # it may be one that is just being made
    for file in live.iterdir():  # as those do that age /tmp
        file.unlink()
    old = time.time() - 100
    for directory in (stale, live):
        os.utime(directory, (old, old))
    foreign = tmp_path / "vllm-sparse-prefill-no-directory"
    foreign.write_text("")
    session(tmp_path).communicate()
    assert not stale.exists()
    assert live.is_dir()
    living.communicate()
    assert living.returncode == 0
    assert not live.exists()
