"""tools/gpu_check: the launch code under a driver that is none, and what it says of kernels.

Whatever compiles runs in a process of its own, where kernels are not interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from tools.gpu_check import judge, variants
from tools.gpu_check.machine import Instruction, Kind
from tools.gpu_check.peaks import GPUS
from tools.gpu_check.pool import executor
from tools.gpu_check.stub import SHARED, stub_driver, target_of
from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES, DTYPES, HEAD_DIMS, launch
from vllm_sparse_backend.selection import AnyPolicy, Mass, Sale
from vllm_sparse_backend.selection.s2 import Strided

DIVISIBLE, NEAR = ["tt.divisibility", 16], ["tt.pointer_range", 32]  # Triton's attributes
STRIDES = {"stride_block", "stride_head", "stride_token"}
ALIGNED = {
    "sum_keys": {"cache", *STRIDES},
    "code_keys": {"cache", "codes", *STRIDES},
    "anchor_rows": {"q", "cache", "codes", "stride_q_token", "stride_q_head", *STRIDES},
    "score_tiles": {"key_codes", "key_steps", "row_codes"},
    "attend_tiles": {
        "q", "cache", "out", "stride_q_token", "stride_q_head", "stride_out_token",
        "stride_out_head", *STRIDES,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process for compiling."""
    with executor(1) as made:
        yield made


@dataclass(frozen=True)
class Launched:
    """One launch, as far as it can be told to another process."""

    kernel: str
    grid: tuple[int, int, int]
    attributes: dict[str, list[Any]]
    shared: int
    warps: int
    stages: int
    target: Any


def _launched(arch: str, shared: int | None = None) -> list[Launched]:
    """The launches of one small layer."""
    with stub_driver(arch, shared) as driver:
        variants.launch_layer(variants.Cell(arch, 64), context=640, rows=128)
    return [
        Launched(
            one.kernel,
            one.grid,
            one.attributes,
            one.metadata.shared,
            one.metadata.num_warps,
            one.metadata.num_stages,
            one.metadata.target,
        )
        for one in driver.launches
    ]


def _out_of_resources(arch: str) -> str:
    try:
        _launched(arch, shared=512)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _asked(context: int, rows: int) -> list[tuple[str, str]]:
    """What one step asks the compiler for."""
    found = variants.variants([variants.Cell("sm_90", 128)], context, rows)
    return sorted((one.kernel, one.specialization) for one in found)


def _asked_for(*policies: AnyPolicy) -> set[tuple[str, str]]:
    """What a layer of such heads asks the compiler for."""
    variants.POLICIES["these"] = policies
    found = variants.variants([variants.Cell("sm_90", 128, policies="these")], 4096, 200)
    return {(one.kernel, one.specialization) for one in found}


def _judged(arch: str, kernel: str) -> judge.Result:
    (one,) = (v for v in variants.variants([variants.Cell(arch, 64)]) if v.kernel == kernel)
    return judge.judge(one)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch in ("sm_90", "gfx942") else pytest.mark.all)
        for arch in ARCHITECTURES
    ],
)
def test_the_launch_code_runs_for_an_architecture_that_is_not_there(
    pool: ProcessPoolExecutor, arch: str
) -> None:
    launches = {one.kernel: one for one in pool.submit(_launched, arch).result()}
    how = launch(arch, 64, 4, torch.bfloat16)
    shapes = {
        "sum_keys": how.keys,
        "mean_keys": how.keys,
        "code_keys": how.keys,
        "anchor_rows": how.anchor,
        "score_tiles": how.score,
        "compact_tiles": how.compact,
        "attend_tiles": how.attend,
    }
    # 640 tokens: 5 chunks of 128, 8 in 2 words of 512 keys; 2 q blocks, all of whose rows are of
    # the tail, in 4 slots each; 24 q heads on 6 kv heads.
    shares = 24 // how.share
    assert {kernel: one.grid for kernel, one in launches.items()} == {
        "sum_keys": (5, 6, 1),
        "mean_keys": (1, 6, 1),
        "code_keys": (8, 6, 1),
        "anchor_rows": (8, shares, 1),
        "score_tiles": (8 // how.score.together, shares, 1),
        "compact_tiles": (2, 24, 1),
        "attend_tiles": (24, 2, 1),
    }
    for kernel, one in launches.items():
        assert 0 <= one.shared <= SHARED[arch], kernel
        assert (one.warps, one.stages) == (shapes[kernel].warps, shapes[kernel].stages)
        assert one.target == target_of(arch)
        # Or no 16 bytes are copied at once.
        aligned = {name for name, its in one.attributes.items() if DIVISIBLE in its}
        assert ALIGNED.get(kernel, set()) <= aligned, kernel
        near = {name for name, its in one.attributes.items() if NEAR in its}
        # A cache of more than 2 GiB, beside which everything is small.
        assert bool(near) == (one.target.backend == "hip") and "cache" not in near


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_a_kernel_that_does_not_fit_is_an_error(pool: ProcessPoolExecutor, arch: str) -> None:
    raised = pool.submit(_out_of_resources, arch).result()
    assert raised.startswith("OutOfResources: out of resource")


def test_no_step_asks_for_another_kernel_than_the_first(pool: ProcessPoolExecutor) -> None:
    first = pool.submit(_asked, 131072, 2048).result()
    for context, rows in ((700, 77), (5000, 2000), (4096, 1)):
        assert pool.submit(_asked, context, rows).result() == first, (context, rows)


def test_list_selectors_ask_for_no_kernel_of_their_own(pool: ProcessPoolExecutor) -> None:
    listed = Strided(tile=64)
    scored, beside, alone = (
        pool.submit(_asked_for, *policies).result()
        for policies in ((Sale(), Mass()), (Sale(), Mass(), listed), (listed,))
    )
    assert beside == scored
    assert alone < scored
    assert {kernel for kernel, _ in alone} == {"compact_tiles", "attend_tiles"}


# Of each kernel, constants that are compiled for together. What is in none of them (how many q
# heads there are, say) is a scalar: registers and shared memory were found not to depend on it.
_CODES = ("D", "BITS", "PACKED")
TOGETHER: dict[str, list[tuple[str, ...]]] = {
    "sum_keys": [("D", "full"), ("D", "near"), ("dtype",), ("page",)],
    "mean_keys": [("D",)],
    "code_keys": [("D", "full"), ("D", "near"), ("D", "PACKED"), ("dtype",), ("BITS",), ("page",)],
    "anchor_rows": [
        ("D", "SHARE_ROWS"), ("D", "full"), ("D", "near"), ("D", "PACKED"),
        ("SHARE_ROWS", "PACKED"), ("dtype",), ("BITS",), ("SHARE",), ("page", "padded"),
    ],
    "score_tiles": [
        ("D", "SHARE_ROWS"), ("D", "HAS_SALE", "PACKED"), ("D", "HAS_MASS", "PACKED"),
        ("D", "WIDE", "PACKED"), ("SHARE_ROWS", "HAS_MASS", "PACKED"),
        ("SHARE_ROWS", "WIDE", "PACKED"), ("HAS_SALE", "HAS_MASS", "WIDE"),
        ("BITS",), ("SHARE",),
    ],
    "compact_tiles": [("SCORED",)],
    "attend_tiles": [("D", "dtype", "near"), ("page", "padded")],
}  # fmt: skip


def _axes(cells: Iterable[variants.Cell]) -> set[tuple[str, tuple[tuple[str, Any], ...]]]:
    """The constants of the kernels that these layers ask for, those that go together."""
    found = set()
    for one in variants.variants(cells):
        its, page = one.constants, one.constants.get("PAGE", 16)
        told = json.loads(one.specialization)
        cache = next((at for at, name in enumerate(told["signature"]) if name == "cache"), None)
        attributes = dict(zip(map(tuple, told["attrs_keys"]), told["attrs_vals"], strict=True))
        of = its | {
            "dtype": None if cache is None else told["signature"]["cache"],
            "full": told["signature"].get("cache") == "*fp32",
            "near": cache is not None and NEAR in attributes.get((cache,), []),
            "padded": its.get("D") != its.get("BLOCK_D"),
            "page": "16" if page == 16 else "many" if page & (page - 1) == 0 else "odd",
        }
        for names in TOGETHER[one.kernel]:
            found.add((one.kernel, tuple((name, of[name]) for name in names)))
    return found


def _not_compiled(arch: str) -> list[Any]:
    layers = [
        variants.Cell(arch, *layer, small=small)
        for layer in product(HEAD_DIMS, (*range(1, 9), 12, 16), DTYPES)
        for small in (False, True)
    ]
    for dim, group, page in product(HEAD_DIMS, (1, 2, 4, 7, 8), (16, 32, 48, 256, 784)):
        layers += [variants.Cell(arch, dim, group, policies=p) for p in variants.POLICIES]
        layers.append(variants.Cell(arch, dim, group, page=page))
    return sorted(_axes(layers) - _axes(variants.all_cells([arch])), key=str)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch in ("sm_90", "gfx950") else pytest.mark.all)
        for arch in ARCHITECTURES
    ],
)
def test_whatever_can_be_launched_is_compiled(pool: ProcessPoolExecutor, arch: str) -> None:
    assert pool.submit(_not_compiled, arch).result() == []


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
