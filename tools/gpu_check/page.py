"""The results as a table on the screen and as docs/gpu-check.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from rich.table import Table

from tools.gpu_check.judge import Result
from tools.gpu_check.machine import Kind
from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES

KERNELS: Final = (
    "sum_keys", "mean_keys", "code_keys", "anchor_rows", "score_tiles", "compact_tiles",
    "attend_tiles",
)  # fmt: skip
KINDS: Final = (Kind.MATRIX, Kind.GLOBAL, Kind.SHARED, Kind.ALU, Kind.SPECIAL, Kind.SHUFFLE)
HEADINGS: Final = (
    "kernel", "arch", "dtype", "dim", "group", "rule", "page", "keys", "warps", "stages", "regs",
    "spills", "KiB", "in flight", *KINDS, "other", "total", "matrix instruction",
)  # fmt: skip


def ordered(results: Iterable[Result]) -> list[Result]:
    """In the order of the launches, architectures as in the launch table."""
    return sorted(
        results,
        key=lambda r: (
            KERNELS.index(r.kernel), r.dtype, r.head_dim, r.group, r.policies, r.page, r.small,
            ARCHITECTURES.index(r.arch),
        ),
    )  # fmt: skip


def row(one: Result) -> tuple[str, ...]:
    """One line under HEADINGS."""
    counts = [f"{one.instructions[kind]:.0f}" for kind in (*KINDS, Kind.OTHER) if one.total]
    return (
        one.kernel, one.arch, one.dtype, str(one.head_dim), str(one.group), one.policies,
        f"{one.page}{' small' if one.small else ''}", str(one.block or ""),
        str(one.warps), str(one.stages), str(one.registers),
        one.spills or "0", f"{one.shared / 1024:.1f}", one.in_flight,
        *(counts or [""] * (len(KINDS) + 1)), f"{one.total:.0f}" if one.total else "", one.matrix,
    )  # fmt: skip


def table(results: Sequence[Result]) -> Table:
    """For the screen; a line with a fault is red."""
    made = Table(*HEADINGS, box=None, header_style="bold", pad_edge=False)
    for one in results:
        made.add_row(*row(one), style="red" if one.faults else "")
    return made


_HEAD: Final = """\
# The GPU kernels, compiled

**Compiled, not timed.** Written by `make gpu-check{options}` (Triton {triton}), which needs no GPU:
{variants} variants for {archs} architectures, {bad} with faults. A variant fails where it does not
compile, spills registers, asks for more shared memory than a block may have, lacks its matrix
instruction, or where attention's loop waits for the very copies that it has just begun. What can be
launched is head_dims, groups, dtypes, policies, bits of codes, pages and (on AMD) caches of less
than 2 GiB or more: each is compiled beside those with which it shares registers and memory. Not
among them is float32 in pages of other than 16 tokens: its attention spills a word on sm_80 at
head_dims 80 to 112 in pages of 64, and up to 128 in pages of 528.

Instructions are those of one warp (AMD: wave) for one product, `keys` keys against a program's
rows, in the loop that does most of the work: `global` loads and copies, `shared` reads and writes
of shared and tensor memory, `alu` arithmetic, `special` exponentials and conversions, `shuffle`
between lanes, `other` waits and branches. On Hopper and Blackwell one matrix instruction is a
product of 64 or 128 rows. `in flight`: copies of 16 bytes that are under way during a product, of
all. `KiB`: shared memory of a block. Scalar registers that AMD's compiler keeps in lanes of vector
registers are shown, and are a fault where a tenth of the loop's instructions reads them back.
"""


def write(path: Path, results: Sequence[Result], quick: bool) -> None:
    """The page: faults, then what most models launch (bfloat16, pages of 16, `sale`)."""
    bad = [one for one in results if one.faults]
    text = _HEAD.format(
        options=' ARGS="--quick"' if quick else "",
        triton=version("triton"),
        variants=len(results),
        archs=len({one.arch for one in results}),
        bad=len(bad),
    )
    if bad:
        text += "\n## Faults\n\n"
        text += "".join(f"- {one.name}: {'; '.join(one.faults)}\n" for one in bad)
    for kernel in KERNELS:
        shown = [one for one in results if one.kernel == kernel and _is_shown(one)]
        text += f"\n## `{kernel}`\n\n" + _markdown(shown)
    path.write_text(text)


def _is_shown(one: Result) -> bool:
    common = one.dtype == "bfloat16" and one.policies == "sale" and one.page == 16
    return common and not one.small and one.head_dim in (64, 128) and one.group in (1, 4)


def _markdown(results: Sequence[Result]) -> str:
    """The table, without the columns in which nothing differs or stands."""
    rows = [dict(zip(HEADINGS, row(one), strict=True)) for one in results]
    fixed = ("kernel", "dtype", "rule", "page")
    names = [n for n in HEADINGS if n not in fixed and any(line[n] for line in rows)]
    text = "| " + " | ".join(names) + " |\n"
    left = ("arch", "matrix instruction")
    text += "|" + "|".join("---" if name in left else "---:" for name in names) + "|\n"
    for line in rows:
        text += "| " + " | ".join(line[name] for name in names) + " |\n"
    return text
