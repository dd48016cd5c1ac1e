"""Compiling in parallel, one process a core."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.gpu_check.judge import Result
    from tools.gpu_check.variants import Variant


def executor(workers: int | None = None) -> ProcessPoolExecutor:
    """Processes in which kernels are compiled and not interpreted, whatever this one does."""
    return ProcessPoolExecutor(
        workers or len(os.sched_getaffinity(0)), get_context("spawn"), _start
    )


def _start() -> None:
    # Triton reads it when a kernel is decorated; nothing has imported one yet.
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def judge_all(
    variants: Sequence[Variant], workers: int | None = None
) -> Iterator[tuple[Variant, Result]]:
    """Each variant with its result, as they come."""
    from tools.gpu_check.judge import judge

    with executor(workers) as pool:
        asked = {pool.submit(judge, variant): variant for variant in variants}
        for future in as_completed(asked):
            yield asked[future], future.result()
