"""Machine code as a list of instructions, by kind, and its loops; NVIDIA's and AMD's."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from triton import knobs


class Kind(StrEnum):
    """What an instruction occupies."""

    MATRIX = "matrix"
    GLOBAL = "global"  # loads from and copies out of global memory, stores into it
    SHARED = "shared"  # of shared or tensor memory
    ALU = "alu"
    SPECIAL = "special"  # exponentials, reciprocals, conversions on the same unit
    SHUFFLE = "shuffle"  # between a warp's lanes
    OTHER = "other"  # waits, branches


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of assembly."""

    opcode: str
    operands: str

    @property
    def kind(self) -> Kind:
        """By the opcode's first letters."""
        for kind, pattern in _KINDS.items():
            if pattern.match(self.opcode):
                return kind
        return Kind.ALU


# The first that matches; what matches none is arithmetic.
_KINDS: Final = {
    kind: re.compile(pattern)
    for kind, pattern in {
        Kind.MATRIX: r"HMMA|IMMA|DMMA|HGMMA|IGMMA|OMMA|QMMA|UTC[HIQO]MMA|v_s?mfma",
        Kind.GLOBAL: r"LDG(?!DEPBAR)|STG|LDGSTS|UBLKCP|RED\b|ATOMG?\b|global_|buffer_|flat_",
        Kind.SHARED: r"LDS|STS|ATOMS|LDT|STT|UTCCP|LDSM|STSM|ds_(?!bpermute|swizzle|permute)",
        Kind.SPECIAL: r"MUFU|I2F\b|F2I\b|F2F\b|v_(exp|rcp|log|sqrt|rsq)_",
        Kind.SHUFFLE: r"SHFL|REDUX|CREDUX|VOTE|MATCH|ds_(bpermute|swizzle|permute)|.*_dpp",
        Kind.OTHER: r"BAR|DEPBAR|LDGDEPBAR|BRA|BSSY|BSYNC|WARPSYNC|NOP|EXIT|CALL|RET|SYNCS|FENCE"
        r"|MEMBAR|ELECT|UTCBAR|WARPGROUP|ERRBAR|CCTL|NANOSLEEP|BPT|LDC|LDL|STL|s_waitcnt|s_barrier"
        r"|s_cbranch|s_branch|s_nop|s_endpgm|s_setprio|s_load|scratch_",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Code:
    """One kernel's instructions in order, and what its loader is told."""

    instructions: list[Instruction]
    loops: list[tuple[int, int]]  # first instruction and last, its branch back
    registers: int
    spills: str  # what was spilled; empty where nothing was
    parked: tuple[str, ...] = ()  # AMD: vector registers whose lanes hold scalars

    def body(self, loop: tuple[int, int]) -> list[Instruction]:
        """The instructions of one loop."""
        return self.instructions[loop[0] : loop[1] + 1]

    def innermost(self, kind: Kind) -> list[list[Instruction]]:
        """The bodies of loops that hold such an instruction, and no loop that does."""
        holding = [loop for loop in self.loops if any(one.kind == kind for one in self.body(loop))]
        return [
            self.body(loop)
            for loop in holding
            if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in holding)
        ]


def read(compiled: Any) -> Code:
    """The machine code of one of Triton's compiled kernels."""
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"])
    return _amd(compiled.asm["amdgcn"])


_SASS: Final = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL: Final = re.compile(r"^(\.L\w+):")
_SASS_TARGET: Final = re.compile(r"`\((\.L\w+)\)")


def _nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    instructions, loops = _parse(text, _SASS, _SASS_LABEL, "BRA", _SASS_TARGET)
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # Kernels have no arrays of their own: whatever lies in local memory was spilled there.
    local = Counter(one.opcode.split(".")[0] for one in instructions)
    stores, loads = local["STL"], local["LDL"]
    spilled = f"{stores} stores, {loads} loads, {used['STACK']} bytes" if stores + loads else ""
    return Code(instructions, loops, used["REG"], spilled)


_GCN: Final = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
_GCN_LABEL: Final = re.compile(r"^(\.LBB\w+):")
_GCN_TARGET: Final = re.compile(r"(\.LBB\w+)")


def _amd(text: str) -> Code:
    code = text[: text.index(".amdhsa_kernel")]
    instructions, loops = _parse(code, _GCN, _GCN_LABEL, "s_", _GCN_TARGET)

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"the assembly does not say {name}"
        return int(found[1])

    vector, scalar = metadata("vgpr_spill_count"), metadata("sgpr_spill_count")
    spilled = [f"{n} {what}" for n, what in ((vector, "vector"), (scalar, "scalar")) if n]
    parked = re.findall(r"implicit-def: \$vgpr(\d+) : SGPR spill to VGPR lane", code)
    return Code(
        instructions,
        loops,
        metadata("vgpr_count"),
        ", ".join(spilled),
        tuple(f"v{number}" for number in parked) if not vector else (),
    )


def _parse(
    text: str,
    line: re.Pattern[str],
    label: re.Pattern[str],
    branch: str,
    target: re.Pattern[str],
) -> tuple[list[Instruction], list[tuple[int, int]]]:
    instructions: list[Instruction] = []
    loops: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for row in text.splitlines():
        if found := label.match(row):
            labels[found[1]] = len(instructions)
        elif found := line.search(row):
            one = Instruction(found[1], found[2])
            if one.opcode.startswith(branch) and (goal := target.search(one.operands)):
                begin = labels.get(goal[1])  # a label that is not known yet lies ahead
                if begin is not None and begin < len(instructions):
                    loops.append((begin, len(instructions)))
            instructions.append(one)
    return instructions, loops


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
