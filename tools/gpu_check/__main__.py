"""`python -m tools.gpu_check`: the command behind `make gpu-check`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from tools.gpu_check import page
from tools.gpu_check.pool import judge_all
from tools.gpu_check.variants import all_cells, quick_cells, variants
from vllm_sparse_backend.ops.triton.launch import ARCHITECTURES

DOCS = Path(__file__).parents[2] / "docs"


def main(
    arch: Annotated[list[str] | None, typer.Option(help="only this architecture (again)")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel (again)")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="bfloat16, head_dim 64 and 128, one selector")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="results to stdout as JSON")] = False,
    write: Annotated[
        bool, typer.Option(help="write docs/gpu-check.md, where all was compiled")
    ] = True,
) -> None:
    """Compile every kernel variant that can be launched, and judge its machine code."""
    console = Console(stderr=True)
    archs = arch or list(ARCHITECTURES)
    begin = time.monotonic()
    cells = quick_cells(archs) if quick else all_cells(archs)
    wanted = [one for one in variants(cells) if not kernel or one.kernel in kernel]
    if not wanted:
        raise typer.BadParameter(f"no kernel is called {kernel}", param_hint="--kernel")
    judged = track(
        judge_all(wanted), "compiling", total=len(wanted), console=console, transient=True
    )
    results = page.ordered(result for _, result in judged)
    bad = [one for one in results if one.faults]
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in results], indent=1))
    else:
        Console(width=None if console.is_terminal else 160).print(page.table(results))
    if write and not arch and not kernel:
        page.write(DOCS / "gpu-check.md", results, quick)
    for one in bad:
        for fault in one.faults:
            console.print(f"[red]{one.name}:[/] {fault}", highlight=False, soft_wrap=True)
    seconds = time.monotonic() - begin
    console.print(f"{len(results)} variants, {len(bad)} with faults, {seconds:.0f} s")
    raise typer.Exit(bool(bad))


if __name__ == "__main__":
    typer.run(main)
