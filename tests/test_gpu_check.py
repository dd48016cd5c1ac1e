"""tools/gpu_check: the launch code under a driver that is none, and what it says of kernels.

Whatever compiles runs in a process of its own, where kernels are not interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tools.gpu_check import judge, variants
from tools.gpu_check.machine import Instruction, Kind
from tools.gpu_check.peaks import GPUS
from tools.gpu_check.pool import executor
from tools.gpu_check.stub import SHARED, stub_driver
from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process for compiling."""
    with executor(1) as made:
        yield made


def _launched(arch: str, shared: int | None = None) -> list[Any]:
    """The launches of one small layer: (kernel, grid, what is a multiple of 16, shared memory)."""
    with stub_driver(arch, shared) as driver:
        variants.launch_layer(variants.Cell(arch, 64), context=640, rows=128)
    return [
        (one.kernel, one.grid, sorted(one.attributes), one.metadata.shared, one.metadata.target)
        for one in driver.launches
    ]


def _out_of_resources() -> str:
    try:
        _launched("sm_80", shared=512)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _asked(context: int, rows: int) -> list[tuple[str, str]]:
    """What one step asks the compiler for."""
    found = variants.variants([variants.Cell("sm_90", 128)], context, rows)
    return sorted((one.kernel, one.specialization) for one in found)


def _judged(arch: str, kernel: str) -> judge.Result:
    (one,) = (v for v in variants.variants([variants.Cell(arch, 64)]) if v.kernel == kernel)
    return judge.judge(one)


def test_the_launch_code_runs_for_an_architecture_that_is_not_there(
    pool: ProcessPoolExecutor,
) -> None:
    launches = pool.submit(_launched, "sm_90").result()
    grids = {kernel: grid for kernel, grid, *_ in launches}
    # 640 tokens: 5 chunks of 128, 8 in 2 words of 512 keys; 2 q blocks; 24 q heads on 6 kv heads.
    assert (grids["sum_keys"], grids["code_keys"]) == ((5, 6, 1), (8, 6, 1))
    assert grids["attend_tiles"] == (24, 2, 1)
    assert grids["compact_tiles"] == (2, 24, 1)
    for kernel, _, multiples, shared, target in launches:
        assert shared <= SHARED["sm_90"]
        assert target.arch == 90
        if kernel == "attend_tiles":  # or no 16 bytes are copied at once
            assert {"q", "cache", "out", "stride_block", "stride_token"} <= set(multiples)


def test_a_kernel_that_does_not_fit_is_an_error(pool: ProcessPoolExecutor) -> None:
    assert pool.submit(_out_of_resources).result().startswith("OutOfResources: out of resource")


def test_no_step_asks_for_another_kernel_than_the_first(pool: ProcessPoolExecutor) -> None:
    first = pool.submit(_asked, 131072, 2048).result()
    for context, rows in ((700, 77), (5000, 2000), (4096, 1)):
        assert pool.submit(_asked, context, rows).result() == first, (context, rows)


@pytest.mark.parametrize(
    ("arch", "kernel", "matrix"),
    [
        ("sm_80", "score_tiles", "IMMA"),
        ("sm_90", "score_tiles", "IGMMA"),
        ("sm_100", "score_tiles", "UTCIMMA"),
        ("sm_90", "attend_tiles", "HGMMA"),
        ("gfx942", "score_tiles", "v_mfma_i32"),
    ],
)
def test_a_kernel_is_judged_by_its_machine_code(
    pool: ProcessPoolExecutor, arch: str, kernel: str, matrix: str
) -> None:
    result = pool.submit(_judged, arch, kernel).result()
    assert result.faults == ()
    assert result.matrix.startswith(matrix)
    assert 0 < result.registers <= 512
    assert 0 < result.shared <= SHARED[arch]
    assert result.total > result.instructions[Kind.MATRIX] > 0
    if kernel == "score_tiles" and arch.startswith("sm_"):
        # For each number of a product that a thread has: a maximum and little else. With lanes
        # that exchange what they have of a subtile it was 5.
        numbers = result.rows * result.block / (32 * result.warps)
        spent = result.instructions[Kind.ALU] + result.instructions[Kind.SHUFFLE]
        assert spent < 3.5 * numbers


@pytest.mark.all
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_most_models_launch_compiles_without_a_fault(
    pool: ProcessPoolExecutor, arch: str
) -> None:
    asked = pool.submit(variants.variants, variants.quick_cells([arch])).result()
    faults = [result for result in pool.map(judge.judge, asked) if result.faults]
    assert not faults, [f"{one.name}: {one.faults}" for one in faults]


def test_waiting_for_what_was_just_begun_is_no_prefetch() -> None:
    copy = [Instruction("LDGSTS.E.BYPASS.128", ""), Instruction("LDGDEPBAR", "")]
    product = [Instruction("HMMA.16816.F32", "")]
    for groups, early in (("0x0", 0), ("0x1", 1)):
        wait = [Instruction("DEPBAR.LE", f"SB0, {groups}")]
        assert judge.in_flight(copy + wait + product) == (early, 1)
    ahead = [Instruction("global_load_dwordx4", "v[0:3], v[4:5], off")]
    last = [Instruction("s_waitcnt", "vmcnt(0) lgkmcnt(0)")]
    mfma = [Instruction("v_mfma_f32_32x32x8_bf16", "")]
    assert judge.in_flight(ahead + last + mfma) == (0, 1)
    assert judge.in_flight(ahead + mfma + last) == (1, 1)


def test_the_stub_is_put_away_again() -> None:
    from triton.runtime import driver

    before = driver._active
    with stub_driver("gfx942"):
        assert driver.active.get_current_target().arch == "gfx942"
    assert driver._active is before
    with pytest.raises(ValueError, match=r"architecture: want one of .*, got 'sm_75'"):
        stub_driver("sm_75").__enter__()


def test_every_gpu_of_the_model_is_one_of_the_launch_table() -> None:
    assert {gpu.arch for gpu in GPUS} <= set(ARCHITECTURES)
