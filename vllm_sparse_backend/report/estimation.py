"""`vllm-sparse estimate`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vllm_sparse_backend.options import Target, errors_named, parse_lengths

if TYPE_CHECKING:
    from vllm_sparse_backend.report.estimate import Estimate
    from vllm_sparse_backend.report.prediction import Row


def estimate(
    model: Annotated[
        str, typer.Argument(help="The model's folder or name, as `vllm serve` takes it.")
    ],
    profile: Annotated[
        Path | None,
        typer.Option(help="The profile's file. Default: what a server would use without one."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Prompt lengths in tokens.")
    ] = "4096,8192,16384,32768,65536,131072",
    target: Target = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of a CPU that compute; taken to share the work evenly. Default: 1.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="What the model computes in. auto: bfloat16, but float32 with avx2."),
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict attention and TTFT of long prompts; nothing is served and no weights are read.

    From rates that ship with the package and the model's configuration: seconds
    of attention by CPU_ATTN, by the core with every tile kept, and with the
    profile's policies followed; attention's share of the time to the first
    token; and the prompt length from which on sparse attention pays. Densities
    are those of the measurement beside the profile (NAME.measurement.json), or,
    without one, expected ones; the output says which.

    For a GPU attention is predicted from compiled kernels and published peaks,
    as a range, and was never timed on hardware; of TTFT nothing is said.

    \b
    Examples:
      vllm-sparse estimate ./model --profile profile.json
      vllm-sparse estimate org/model --lengths 32768,131072 --target avx512_bf16 --threads 32
      vllm-sparse estimate org/model --lengths 32768,131072 --target sm_90

    \b
    Exit status:
      0    predicted
      2    not possible: the message says what is wrong with which input
    """
    with errors_named():
        wanted = parse_lengths(lengths)
        from vllm_sparse_backend.report.estimate import make_estimate

        made = make_estimate(model, profile, wanted, target=target, threads=threads, dtype=dtype)
        if json:
            typer.echo(made.model_dump_json(indent=2))
        else:
            _print(made)


def _print(made: Estimate) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    unit = "seconds" if made.timed else "milliseconds"
    title = f"{made.title()}; {unit}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    headings = (
        "prompt\ntokens", f"attention\n{made.base}", "attention\nkeep-all", "attention\nsparse",
        "\nratio", "\ndensity",
    )  # fmt: skip
    of_all = ("TTFT\ndense", "TTFT\nsparse", "share\ndense", "share\nsparse")
    for heading in (*headings, *(of_all if made.timed else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in made.rows:
        table.add_row(f"{row.length:,}", *(_timed(row) if made.timed else _predicted(row)))
    console.print(table)
    for line in made.notes():
        console.print(line, markup=False, soft_wrap=True)


def _timed(row: Row) -> tuple[str, ...]:
    return (
        *(seconds(value) for value in (row.base, row.keep_all, row.sparse)),
        f"{row.base / row.sparse:.2f}x",
        f"{row.density:.3f}",
        *(seconds(value) for value in (row.dense_ttft, row.sparse_ttft)),
        *(f"{share:.0%}" for share in (row.dense_share, row.sparse_share)),
    )


def _predicted(row: Row) -> tuple[str, ...]:
    """Of a GPU: ranges, better end to worse, in milliseconds."""
    best, kept = row.sparse_best or row.sparse, row.keep_all_best or row.keep_all
    spans = [
        " to ".join(seconds(1e3 * x) for x in its)
        for its in ((kept, row.keep_all), (best, row.sparse))
    ]
    ratio = f"{row.base / row.sparse:.1f} to {row.base / best:.1f}x"
    return seconds(1e3 * row.base), *spans, ratio, f"{row.density:.3f}"


def seconds(value: float) -> str:
    """Three figures are more than a prediction has."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
