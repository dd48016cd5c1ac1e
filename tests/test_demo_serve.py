"""Starting and stopping a real `vllm serve`: what a failed start says, and that nothing stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_sparse_backend.demo.contention import cpu_time
from vllm_sparse_backend.demo.serve import (
    Server,
    ServerFailed,
    ServerOptions,
    free_port,
    is_free,
)


def options(model: Path) -> ServerOptions:
    return ServerOptions(model=str(model), served_name="tiny", max_model_len=1024, threads=1)


def test_a_failed_start_shows_the_logs_end_and_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    log = tmp_path / "logs" / "dense.log"
    with pytest.raises(ServerFailed) as failure, Server("dense", options(tmp_path), log):
        pytest.fail("it started")
    message = str(failure.value)
    assert "the dense server ended with exit status 1" in message
    assert "--attention-backend CPU_ATTN" in message and str(log) in message
    assert "no-such-type" in message  # vLLM's own reason
    assert message.endswith(log.read_text().splitlines()[-1])


def test_leaving_a_server_ends_all_its_processes(tmp_path: Path) -> None:
    # A stand-in with a child, as the API server has its engine: to end what was started is all
    # that is asked here.
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, time; p = os.fork(); p and print(p, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    server = Server("dense", options(tmp_path), tmp_path / "log")
    server._process = child  # type: ignore[assignment]
    server.stop()
    assert child.poll() is not None
    # It is not ours to wait for, and dies when the kernel gets to it.
    deadline = time.monotonic() + 10
    while _runs(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(grandchild)
    server.stop()  # a second time does nothing


def _runs(pid: int) -> bool:
    try:
        # An orphan that is not reaped yet is a zombie: Z.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_work_of_others_is_told_from_the_sessions_own() -> None:
    spin = "import time; e = time.process_time() + 1.0\nwhile time.process_time() < e: pass"
    before = cpu_time(os.getsid(0))
    own = subprocess.Popen([sys.executable, "-c", spin])
    other = subprocess.Popen([sys.executable, "-c", spin], start_new_session=True)
    # Read before they are reaped: the CPU time of what has ended is nobody's.
    for process in (own, other):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    after = cpu_time(os.getsid(0))
    for process in (own, other):
        process.wait()
    assert after.session - before.session >= 1.0
    assert after.others_since(before) * (after.wall - before.wall) >= 0.9


def test_a_taken_port_is_seen() -> None:
    port = free_port()
    assert is_free(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free(port)
    assert is_free(port)


def test_the_shown_command_is_the_one_that_runs(tmp_path: Path) -> None:
    served = options(tmp_path)
    line = served.shell("sparse", 8000)
    assert "OMP_NUM_THREADS=1" in line and "HF_HUB_OFFLINE=1" in line
    words = subprocess.run(  # a shell reads it as the arguments it stands for
        ["bash", "-c", f"vllm() {{ printf '%s\\0' \"$@\"; }}; {line}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert words.split("\0")[:-1] == served.arguments("sparse", 8000)
