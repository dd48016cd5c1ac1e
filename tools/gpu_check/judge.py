"""One variant compiled, and judged by its machine code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from tools.gpu_check.machine import Code, Instruction, Kind, read
from tools.gpu_check.stub import SHARED, stub_driver
from tools.gpu_check.variants import Variant
from vllm_sparse_backend.ops.tiles import Q_BLOCK

ATTEND: Final = "attend_tiles"
# What a kernel multiplies: numbers of the model, or codes, as integers or as 4-bit floats.
_MATRIX: Final = {
    ATTEND: r"HMMA|HGMMA|UTCHMMA|v_mfma_f32_\w*b?f16",
    "anchor_rows": r"HMMA|HGMMA|UTCHMMA|v_mfma_f32_\w*b?f16",
    "score_tiles": r"IMMA|IGMMA|UTCIMMA|v_mfma_i32_\w*i8",
}
_FP4: Final = r"UTCOMMA|OMMA\.SF|v_mfma_scale_f32_\w*f8f6f4"
LEAST_EARLY: Final = 0.75  # of copies: the scheduler may place one behind the last product
MOST_TENSOR_MEMORY: Final = 512  # columns, on Blackwell
# AMD's compiler keeps scalars that find no register in lanes of vector ones. They never go to
# memory; reading one back is an instruction, and so many of a loop's may be such.
MOST_PARKED: Final = 0.1


class Result(BaseModel):
    """What one variant compiles to. Instructions: of one warp, for one product of a tile."""

    model_config = ConfigDict(frozen=True)

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    group: int
    policies: str
    page: int
    small: bool = False  # the cache, less than 2 GiB
    block: int = 0  # keys of a product; 0 where a kernel has none
    rows: int = 0  # of a product, likewise
    warps: int
    stages: int
    registers: int = 0
    spills: str = ""
    shared: int = 0  # bytes
    matrix: str = ""  # the instruction that multiplies
    products: float = 0.0  # in the loop's body
    instructions: dict[Kind, float] = {}
    total: float = 0.0
    in_flight: str = ""  # copies that a product overlaps, of all copies in the loop
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return (
            f"{self.kernel} {self.arch} {self.dtype} head_dim {self.head_dim} group {self.group} "
            f"{self.policies} page {self.page}{' small' if self.small else ''}"
        )


def judge(variant: Variant) -> Result:
    """Compile and read it. A compile error is a fault like any other."""
    cell = variant.cell
    about: dict[str, Any] = {
        "kernel": variant.kernel,
        "arch": cell.arch,
        "dtype": str(cell.dtype).removeprefix("torch."),
        "head_dim": cell.head_dim,
        "group": cell.group,
        "policies": cell.policies,
        "page": cell.page,
        "small": cell.small,
        "block": _block(variant),
        "rows": _rows(variant) if variant.kernel in _MATRIX else 0,
        "warps": variant.warps,
        "stages": variant.stages,
    }
    function = getattr(import_module(variant.module), variant.kernel)
    try:
        with stub_driver(cell.arch):
            compiled = function.preload(variant.specialization)
    except Exception as raised:  # of Triton, MLIR, LLVM or ptxas
        error: BaseException = raised
        while error.__cause__ is not None:  # what a CompilationError points at
            error = error.__cause__
        return Result(**about, faults=(f"does not compile: {str(error).strip()[-300:]}",))
    code = read(compiled)
    found = _loop(variant, code)
    faults = [f"spills: {code.spills}"] if code.spills and not code.parked else []
    shared = compiled.metadata.shared
    if shared > SHARED[cell.arch]:
        faults.append(f"shared memory: {shared} bytes of {SHARED[cell.arch]}")
    if (getattr(compiled.metadata, "tmem_size", 0) or 0) > MOST_TENSOR_MEMORY:
        faults.append(f"tensor memory: {compiled.metadata.tmem_size} of {MOST_TENSOR_MEMORY}")
    faults += found.pop("faults", ())
    return Result(
        **about,
        **found,
        registers=code.registers,
        spills=code.spills,
        shared=shared,
        faults=tuple(faults),
    )


def _block(variant: Variant) -> int:
    return int(variant.constants.get("BLOCK_N", variant.constants.get("KEYS", 0)))


def _rows(variant: Variant) -> int:
    c = variant.constants
    return int(c.get("SHARE_ROWS", Q_BLOCK) * c.get("TOGETHER", 1))


def _packed(variant: Variant) -> bool:
    return variant.kernel == "score_tiles" and bool(variant.constants["PACKED"])


def _loop(variant: Variant, code: Code) -> dict[str, Any]:
    """The loop that does a kernel's products, and what is wrong with it."""
    pattern = _FP4 if _packed(variant) else _MATRIX.get(variant.kernel)
    exact = variant.cell.dtype.itemsize == 4 and variant.kernel != "score_tiles"
    if variant.kernel == "compact_tiles":  # no products: a pass over a block of bits
        body = max(code.innermost(Kind.GLOBAL), key=len)
        return _counted(body, 1.0)
    if pattern is None or exact:  # without a loop; or in fp32, which is not for matrix units
        return {}
    loops = code.innermost(Kind.MATRIX)
    loops = [body for body in loops if any(re.match(pattern, one.opcode) for one in body)]
    if not loops:
        return {"faults": [f"no matrix instruction ({pattern}) in a loop"]}
    # Where there are two, the other one masks keys, and that costs more.
    products, body = min(
        ((_products(variant, body), body) for body in loops), key=lambda x: len(x[1]) / x[0]
    )
    found = _counted(body, products)
    found["matrix"] = next(one.opcode for one in body if one.kind == Kind.MATRIX)
    parked = sum(_reads(one, code.parked) for one in body)
    much = parked > MOST_PARKED * len(body)
    found["faults"] = [f"spills: {code.spills}, {parked} reads in the loop"] if much else []
    if variant.kernel == ATTEND:
        early, copies = in_flight(body)
        found["in_flight"] = f"{early}/{copies}"
        if not copies or early < LEAST_EARLY * copies:
            found["faults"].append(f"lost prefetch: {early} of {copies} copies overlap a product")
    return found


def _reads(one: Instruction, registers: Sequence[str]) -> bool:
    sources = one.operands.split(",")[1:]
    return one.opcode.startswith("v_readlane") and any(x.strip() in registers for x in sources)


def _counted(body: Sequence[Instruction], products: float) -> dict[str, Any]:
    counts = Counter(one.kind for one in body)
    return {
        "products": round(products, 2),
        "instructions": {kind: round(counts[kind] / products, 1) for kind in Kind},
        "total": round(len(body) / products, 1),
    }


def _products(variant: Variant, body: Sequence[Instruction]) -> float:
    """How many products of the kernel's block a loop's body does, all warps together."""
    c = variant.constants
    rows, block, depth = _rows(variant), _block(variant), c["BLOCK_D"]
    needed = 2 * rows * block * depth
    fifth_generation = depth // (
        64 if _packed(variant) else 32 if variant.kernel == "score_tiles" else 16
    )
    if variant.kernel == ATTEND:
        needed *= 2
        fifth_generation += block // 16
    done = 0.0
    for one in body:
        if one.kind != Kind.MATRIX:
            continue
        if one.opcode.startswith("UTC"):  # by one thread, of a size that a register holds
            done += needed / fifth_generation
        elif shape := re.search(r"\.16(8)(\d+)\.?", one.opcode):  # of a warp
            done += 2 * 16 * 8 * int(shape[2]) * variant.warps
        elif shape := re.search(r"(\d+)x(\d+)x(\d+)", one.opcode):  # of a wave, or of four warps
            m, n, k = map(int, shape.groups())
            done += 2 * m * n * k * variant.warps / (4 if "GMMA" in one.opcode else 1)
    return done / needed


def in_flight(body: Sequence[Instruction]) -> tuple[int, int]:
    """(copies of 16 bytes that are under way during some matrix instruction, all of them).

    The loop is walked three times and judged by the last walk but one. NVIDIA: copies are put
    into groups, and a wait leaves the newest n of them under way. AMD: a wait leaves the newest n
    loads.
    """
    group: list[int] = []
    pending: list[list[int]] = []
    under_way: set[int] = set()
    early: set[int] = set()
    copies: set[int] = set()
    for walk in range(3):
        for at, one in enumerate(body):
            key = walk * len(body) + at
            if one.opcode.startswith("LDGSTS"):
                group.append(key)
                under_way.add(key)
                if ".128" in one.opcode:
                    copies.add(key)
            elif one.opcode == "LDGDEPBAR":
                pending.append(group)
                group = []
            elif re.match(r"(global|buffer)_load", one.opcode):
                pending.append([key])
                under_way.add(key)
                if "x4" in one.opcode or "lds" in one.opcode + one.operands:
                    copies.add(key)
            elif (left := _left(one)) is not None:
                while len(pending) > left:
                    under_way.difference_update(pending.pop(0))
            elif one.kind == Kind.MATRIX:
                early |= under_way
    middle = range(len(body), 2 * len(body))
    chosen = {key for key in copies if key in middle}
    return len(chosen & early), len(chosen)


def _left(one: Instruction) -> int | None:
    """How many groups or loads this instruction lets be under way; None where it does not wait."""
    if one.opcode.startswith("DEPBAR"):
        found = re.match(r"SB0, (0x\w+)", one.operands)
        return int(found[1], 16) if found else None
    if one.opcode == "s_waitcnt":
        found = re.search(r"vmcnt\((\d+)\)", one.operands)
        return int(found[1]) if found else None
    return None
