"""Every instruction set's path, compiled for AVX2: the proof of those that this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _attention import (
    BITS,
    DTYPES,
    assert_accurate,
    causal_mask,
    make_paged,
    make_qkv,
    needs_core,
    run,
)
from _tiles import assert_same_tiles

from vllm_sparse_backend.ops import select_tiles
from vllm_sparse_backend.ops.cpu import build, core
from vllm_sparse_backend.selection import DENSE, Bits, Mass, Sale

ISAS = [isa.name for isa in build.instruction_sets()]


def runs_everything_natively() -> bool:
    try:
        return all(core.isas().values())
    except core.CoreUnavailable:
        return True  # other tests say so


# Where all of it runs natively, the build of 20 seconds shows nothing about the paths, only
# that the emulation still compiles.
pytestmark = [needs_core, *([pytest.mark.all] if runs_everything_natively() else [])]


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    library = tmp_path_factory.mktemp("core") / "emulated.so"
    build.build(library, emulated=True)
    core.use_library(library)
    yield
    core.use_library(None)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, emulated: None) -> str:
    core.set_isa(request.param)
    return str(request.param)


def test_every_path_runs_here() -> None:
    assert core.isas() == dict.fromkeys(ISAS, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_keeping_all_is_dense_attention(isa: str, dim: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(50, 70, 130, heads=3, kv_heads=1, dim=dim, dtype=dtype)
    for kv_layout in ("vec", "amx") if dtype == torch.bfloat16 else ("vec",):
        paged = make_paged([qkv], kv_layout, 32)
        assert_accurate(run(paged, DENSE, "cpu")[0], qkv, causal_mask(70, 130))
    assert core.active_isa() == isa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_tiles_are_the_reference_s(isa: str, bits: Bits, dtype: torch.dtype) -> None:
    policies = [
        selector(sink=16, local=16, tau=0.03, bits=bits, tile=tile)  # type: ignore[arg-type]
        for selector, tile in ((Sale, 16), (Mass, 16), (Mass, 64))
    ]
    qkv = make_qkv(51, 100, 400, heads=3, kv_heads=1, dtype=dtype)
    paged = make_paged([qkv])
    own, other = (select_tiles(*paged.tensors, policies, impl=i) for i in ("cpu", "reference"))
    assert_same_tiles(own, other, qkv, policies, 0.125)
    assert 0 < sum(own.computed) < sum(own.causal)
