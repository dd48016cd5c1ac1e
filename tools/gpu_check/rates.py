"""`python -m tools.gpu_check.rates`: what `ops.triton.cost` predicts by, from compiled kernels.

The same reckoning as `model`, for each head_dim and number of heads that are scored together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

import typer
from rich.console import Console

from tools.gpu_check.judge import Result
from tools.gpu_check.model import product_seconds
from tools.gpu_check.peaks import GPUS, Gpu
from tools.gpu_check.pool import judge_all
from tools.gpu_check.variants import Cell, Variant, variants
from vllm_sparse_backend.ops.tiles import Q_BLOCK, SUBTILE
from vllm_sparse_backend.ops.triton.cost import (
    FILE,
    CodeRates,
    Ends,
    GpuRates,
    HeadRates,
    RatesFile,
)
from vllm_sparse_backend.ops.triton.launch import HEAD_DIMS, padded
from vllm_sparse_backend.ops.triton.work import SLOT_ROWS

GROUPS: Final = (1, 2, 4, 8)
INT8, FP4 = "sale", "sale fp4"  # as `variants.POLICIES`
MAIN: Final = 4  # the group whose attention and scores stand for all
DIGITS: Final = 4
SUBTILES: Final = 1024  # of a `compact_tiles` pass


def wanted(archs: Iterable[str], dims: Iterable[int] = HEAD_DIMS) -> list[Variant]:
    """The kernels that rates are made of."""
    its = list(dims)
    cells = [
        Cell(gpu.arch, dim, group, policies=policies)
        for gpu in GPUS
        if gpu.arch in archs
        for policies in ((INT8, FP4) if gpu.fp4 else (INT8,))
        for dim in its
        for group in GROUPS
    ]
    return [
        variant
        for variant in variants(cells)
        if variant.kernel in ("anchor_rows", "score_tiles", "attend_tiles", "compact_tiles")
        and (variant.kernel == "anchor_rows" or variant.cell.group in (MAIN, GROUPS[0]))
    ]


def rates_of(results: Iterable[Result]) -> RatesFile:
    """Of each GPU that was compiled for. Attention and scores are of group ``MAIN``, or of
    what the first group has in common with it."""
    by_arch: dict[str, list[Result]] = {}
    for one in results:
        by_arch.setdefault(one.arch, []).append(one)
    return RatesFile({gpu.arch: _gpu(gpu, its) for gpu in GPUS if (its := by_arch.get(gpu.arch))})


def _gpu(gpu: Gpu, results: list[Result]) -> GpuRates:
    found: dict[int, dict[tuple[str, str], dict[int, Result]]] = {}
    compact = next(one for one in results if one.kernel == "compact_tiles")
    for one in results:
        of_head = found.setdefault(one.head_dim, {})
        of_head.setdefault((one.kernel, one.policies), {})[one.group] = one
    seconds, _ = product_seconds(gpu, compact, gpu.bf16, 0)
    return GpuRates(
        gpu=gpu.name,
        dense=gpu.dense,
        dense_rate=_short(gpu.bf16 * gpu.dense_share / 1e12),
        bandwidth=_short(gpu.bandwidth / 1e12),
        chunk=gpu.chunk,
        compact=_short(SUBTILES * SUBTILE / seconds / 1e12),
        heads={dim: _head(gpu, dim, its) for dim, its in sorted(found.items())},
    )


def _head(gpu: Gpu, dim: int, kernels: dict[tuple[str, str], dict[int, Result]]) -> HeadRates:
    def main(kernel: str, policies: str) -> Result:
        of = kernels[kernel, policies]
        return of.get(MAIN) or of[GROUPS[0]]

    def codes(policies: str, peak: float) -> CodeRates:
        anchors = kernels["anchor_rows", policies]
        return CodeRates(
            score=_rate(gpu, main("score_tiles", policies), dim, 2 * peak, 2),
            anchor={
                one.rows // SLOT_ROWS: _rate(gpu, one, dim, 2 * gpu.bf16, 2)
                for _, one in sorted(anchors.items())
            },
        )

    return HeadRates(
        attend=_rate(gpu, main("attend_tiles", INT8), dim, gpu.bf16, 4),
        int8=codes(INT8, gpu.int8),
        fp4=codes(FP4, gpu.fp4) if gpu.fp4 else None,
    )


def _rate(gpu: Gpu, kernel: Result, dim: int, peak: float, operations: int) -> Ends:
    """1e12 operations a second, of the model's channels alone."""
    rows = kernel.rows or Q_BLOCK
    work = operations * rows * kernel.block * dim
    better, worse = product_seconds(gpu, kernel, peak, rows, padded(dim))
    return _short(work / better / 1e12), _short(work / worse / 1e12)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def text(made: RatesFile) -> str:
    """The file's, a line for each head_dim."""
    parts = []
    for arch, its in made.model_dump(mode="json", exclude_none=True).items():
        heads = ",\n".join(f'  "{dim}": {json.dumps(row)}' for dim, row in its.pop("heads").items())
        parts.append(f' "{arch}": {json.dumps(its)[:-1]}, "heads": {{\n{heads}\n }}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Compile, and write the rates."""
    made = rates_of(result for _, result in judge_all(wanted(gpu.arch for gpu in GPUS)))
    FILE.write_text(text(made))
    Console(stderr=True).print(f"wrote {FILE}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
