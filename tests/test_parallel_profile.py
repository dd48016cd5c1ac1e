"""Processes of one server that would follow different profiles do not serve together."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _batch import engine_config
from _engine import environment
from _parallel import HEADS, write_profile
from _server import command

from vllm_sparse_backend.backend.start import resolve
from vllm_sparse_backend.backend.worker import expect_common
from vllm_sparse_backend.demo.serve import free_port
from vllm_sparse_backend.errors import ConfigError, ProfileMismatch
from vllm_sparse_backend.profile import load_profile

pytestmark = needs_core


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "profile.json", HEADS)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Differs in one head of one layer."""
    return write_profile(tmp_path / "second.json", [HEADS[0], [HEADS[1][1], *HEADS[1][1:]]])


def digest(path: Path) -> str:
    return load_profile(path).digest


def as_a_worker(config: Any) -> Any:
    return resolve(pickle.loads(pickle.dumps(config)))


def test_the_digest_travels_with_the_configuration(tiny_llama: Path, first: Path) -> None:
    given = {"profile": str(first)}
    config = engine_config(tiny_llama, given)
    assert config.additional_config["sparse_prefill"] == {**given, "profile_digest": digest(first)}
    assert given == {"profile": str(first)}  # the user's own stays as it is
    assert as_a_worker(config).profile == load_profile(first)


def test_nothing_is_passed_on_where_there_is_no_profile(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, {"min_prompt_tokens": 600})
    assert config.additional_config["sparse_prefill"] == {"min_prompt_tokens": 600}
    as_a_worker(config)


def test_a_file_that_changes_between_driver_and_worker(
    tiny_llama: Path, first: Path, second: Path
) -> None:
    before, after = digest(first), digest(second)
    config = engine_config(tiny_llama, {"profile": str(first)})
    os.replace(second, first)
    with pytest.raises(ProfileMismatch, match=rf"want {before}, .* got {after} of .*profile\.json"):
        as_a_worker(config)


def test_a_new_name_or_note_is_no_other_profile(tiny_llama: Path, first: Path) -> None:
    config = engine_config(tiny_llama, {"profile": str(first)})
    renamed = {**json.loads(first.read_text()), "name": "other", "calibration": {"note": "new"}}
    first.write_text(json.dumps(renamed))
    assert as_a_worker(config).profile.name == "other"


def test_a_configured_digest(tiny_llama: Path, first: Path, second: Path) -> None:
    engine_config(tiny_llama, {"profile": str(first), "profile_digest": digest(first)})
    with pytest.raises(ProfileMismatch, match=f"want {digest(second)}.* got {digest(first)}"):
        engine_config(tiny_llama, {"profile": str(first), "profile_digest": digest(second)})
    with pytest.raises(ProfileMismatch, match=f"want {digest(first)}.* got no profile"):
        engine_config(tiny_llama, {"profile_digest": digest(first)})
    with pytest.raises(ConfigError, match="profile_digest or policy, not both"):
        policy = {"selector": "dense"}
        engine_config(tiny_llama, {"policy": policy, "profile_digest": digest(first)})


@pytest.fixture(params=["file", "tcp"])
def process_group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """As a worker has one, with either store that vLLM uses."""
    import torch.distributed

    dist: Any = torch.distributed  # does not say that it exports stores
    if request.param == "file":
        store = dist.FileStore(str(tmp_path / "store"), 1)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_nodes_compare_what_they_have_loaded(tiny_llama: Path, first: Path, second: Path) -> None:
    def come(section: dict[str, Any], **more: Any) -> None:
        config = engine_config(tiny_llama, section, tensor_parallel_size=2, **more)
        expect_common(config, as_a_worker(config))

    for profile in (first, second):  # two engines of one process are none of each other's business
        come({"profile": str(profile)})
    come({"profile": str(first)}, nnodes=2)
    come({"profile": str(first), "cpu_isa": "avx2"}, nnodes=2)
    with pytest.raises(ProfileMismatch, match=f"{digest(first)} on another.*{digest(second)} on"):
        come({"profile": str(second)}, nnodes=2)
    with pytest.raises(ProfileMismatch, match="min_prompt_tokens: 2048 on another rank, 9 on this"):
        come({"profile": str(first), "min_prompt_tokens": 9}, nnodes=2)
    with pytest.raises(ProfileMismatch, match=rf"{digest(first)} on another.*None on this.*policy"):
        come({"policy": {"selector": "dense"}}, nnodes=2)


CHANGED = """
import os, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

def main():
    model, profile, second = sys.argv[1:]
    config = EngineArgs(
        model=model, attention_backend="sparse_prefill", skip_tokenizer_init=True,
        enforce_eager=True, tensor_parallel_size=2,
        additional_config={"sparse_prefill": {"profile": profile}},
    ).create_engine_config()
    os.replace(second, profile)
    LLMEngine.from_vllm_config(config)

if __name__ == "__main__":  # spawned workers import this file
    main()
"""


def test_an_engine_whose_workers_find_another_file(
    tiny_llama: Path, first: Path, second: Path, tmp_path: Path
) -> None:
    before, after = digest(first), digest(second)
    script = tmp_path / "changed.py"
    script.write_text(CHANGED)
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_llama), str(first), str(second)],
        env=environment(OMP_NUM_THREADS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    assert f"want {before}, " in done.stdout + done.stderr
    assert f"got {after} of the profile {first}" in done.stdout + done.stderr


class Nodes:
    """A server over two nodes, which here are two commands with files of their own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.port = model, folder, free_port()
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, section: dict[str, Any]) -> subprocess.Popen[bytes]:
        options = ["--tensor-parallel-size", "2", "--nnodes", "2", "--node-rank", str(rank)]
        options += ["--master-addr", "127.0.0.1", "--master-port", str(self.port)]
        options += ["--headless"] if rank else ["--host", "127.0.0.1", "--port", str(free_port())]
        with self.log(rank).open("wb") as stream:
            process = subprocess.Popen(
                command(self.model, section, *options),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment(OMP_NUM_THREADS="1", VLLM_HOST_IP="127.0.0.1"),
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def log(self, rank: int) -> Path:
        return self.folder / f"node{rank}.log"

    def end(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def nodes(tiny_llama: Path, tmp_path: Path) -> Iterator[Nodes]:
    started = Nodes(tiny_llama, tmp_path)
    yield started
    started.end()


@pytest.mark.all
def test_two_nodes_with_different_files(nodes: Nodes, first: Path, second: Path) -> None:
    """Each node has a configuration of its own: only the ranks can see that they differ."""
    head = nodes.start(0, {"profile": str(first)})
    nodes.start(1, {"profile": str(second)})
    assert head.wait(300) != 0
    logs = nodes.log(0).read_text() + nodes.log(1).read_text()
    assert "want the same on all ranks of a server, got profile: " in logs
    assert digest(first) in logs
    assert digest(second) in logs
