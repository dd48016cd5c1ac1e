"""The way into vLLM's CUDA platform, in a fresh process: its real class, with the extensions that a
CPU build lacks left empty, and a GPU that is only a number."""

from __future__ import annotations

import pytest
from test_plugin import fresh

pytest.importorskip("vllm")

CUDA = """
import sys, types
for missing in ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa2_C", "vllm_flash_attn._vllm_fa3_C"):
    sys.modules["vllm." + missing] = types.ModuleType("vllm." + missing)
import torch
import vllm.platforms as platforms
from vllm.platforms.cuda import CudaPlatformBase, NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

CAPABILITY = [9, 0]

class OneGpu(NonNvmlCudaPlatform):
    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(*CAPABILITY)

    @classmethod
    def get_device_name(cls, device_id=0):
        return "a GPU"

platforms._current_platform = OneGpu()

from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends
from vllm.v1.attention.selector import AttentionSelectorConfig

def choose(backend, **more):
    traits = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": None, "block_size": 16}
    config = AttentionSelectorConfig(**{**traits, **more})
    try:
        with set_current_vllm_config(VllmConfig()):
            return OneGpu.get_attn_backend_cls(backend, config, num_heads=9)
    except ValueError as error:
        return str(error)

def build(backend=None, **section):
    return VllmConfig(
        attention_config=AttentionConfig(backend=backend),
        additional_config={"sparse_prefill": section},
    )

def others():
    plain = [None, Backends.FLASH_ATTN, Backends.TRITON_ATTN]
    return [choose(backend, **more) for backend in plain
            for more in ({}, {"dtype": torch.float32}, {"use_mla": True, "head_size": 576})]

before = others()
from vllm_sparse_backend import compat, plugin
plugin._register()
wrapped = CudaPlatformBase.get_attn_backend_cls.__func__
plugin._register()
assert CudaPlatformBase.get_attn_backend_cls.__func__ is wrapped, "wrapped twice"
member = Backends["SPARSE_PREFILL"]
new = {name for name in sys.modules if name.startswith("vllm_sparse_backend")}
assert not [name for name in new if ".ops" in name or ".backend" in name], new
"""


def test_the_platform_chooses_by_what_the_base_backends_can_and_checks_starts() -> None:
    fresh(
        CUDA
        + """
assert others() == before
flash = "vllm_sparse_backend.backend.cuda_flash.SparsePrefillFlashBackend"
triton = "vllm_sparse_backend.backend.cuda_triton.SparsePrefillTritonBackend"
assert choose(member) == flash
assert choose(member, dtype=torch.float32) == triton
mla = {"use_mla": True, "head_size": 576}
assert choose(member, **mla) == choose(None, **mla)
said = choose(member, kv_cache_dtype="turboquant_k8v4")
assert "Reasons: {'FLASH_ATTN': ['kv_cache_dtype not supported'], 'TRITON_ATTN'" in said, said
# As vLLM has the class from the registry, and from the path that the platform returned.
from vllm.utils.import_utils import resolve_obj_by_qualname
assert member.get_class() is resolve_obj_by_qualname(flash)
for path, name in ((flash, "FLASH_ATTN"), (triton, "TRITON_ATTN")):
    backend = resolve_obj_by_qualname(path)
    assert backend.get_name() == name and not backend.is_sparse()
    assert not backend.forward_includes_kv_cache_update
    assert backend.supported_kv_cache_layouts() is None
CAPABILITY[:] = 7, 5
assert choose(member, dtype=torch.float16) == triton
assert member.get_class() is resolve_obj_by_qualname(triton)

# Starts are checked, and no kernel is imported for it.
config = build("sparse_prefill", min_prompt_tokens=4096)
assert compat.is_selected(config)
from vllm_sparse_backend.backend import start
setup = start.resolve(config)
assert (setup.platform, setup.isa) == ("cuda", "triton")
assert setup.describe().startswith("prefill on CUDA with triton, the rest by FLASH_ATTN or TRITON")
assert start.capabilities().head_dims
kernels = {name for name in sys.modules if name.startswith("vllm_sparse_backend.ops.triton.")}
assert kernels == {"vllm_sparse_backend.ops.triton.launch"}, kernels

from vllm_sparse_backend.errors import ConfigError
for section in ({"min_promt_tokens": 1}, {"cpu_isa": "avx2"}, {"dense_core": False}):
    try:
        build("sparse_prefill", **section)
    except ConfigError as error:
        assert next(iter(section)) in str(error), error
    else:
        raise AssertionError(f"nothing was said about {section}")
    build(None, **section)  # not ours to judge

# Every policy is followed as soon as a request is sparse: no length was measured to pay.
from vllm_sparse_backend.backend.worker import Worker
table = Worker(setup, 0).policies("model.layers.0.attn", 4, 64)
assert table.dense_below == [0] * 4

from vllm_sparse_backend import compat
from vllm_sparse_backend.doctor import _gpu
gpu = _gpu("cuda")
assert (gpu.name, gpu.capability, gpu.fp4) == ("a GPU", "7.5", False) and gpu.triton
for platform, with_fp4, without in (
    ("cuda", ("10.0", "10.3", "12.0"), ("8.0", "9.0")), ("rocm", ("9.5",), ("9.4",))
):
    for capability in (*with_fp4, *without):
        compat.gpu = lambda: ("another", capability)
        assert _gpu(platform).fp4 is (capability in with_fp4), capability
"""
    )
