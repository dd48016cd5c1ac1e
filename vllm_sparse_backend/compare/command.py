"""`vllm-sparse compare`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_sparse_backend.options import (
    ChunkTokens,
    Dtype,
    HfOverrides,
    Refused,
    errors_named,
    json_object,
    parse_lengths,
)
from vllm_sparse_backend.tasks.catalog import LIKELIHOOD, Task

if TYPE_CHECKING:
    from vllm_sparse_backend.compare.results import Comparison
    from vllm_sparse_backend.selection import AnyPolicy

PARTS = ".parts"  # beside the page, instead of its .html
TASKS, DOCUMENTS = "text,copy", 2  # of --end-to-end


def compare_(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name, as `vllm serve` takes it.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(help="A file or folder of text like that which will be served; repeat."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            metavar="all|NAME,...",
            help="Which methods; -NAME leaves one out: all,-hip. The default's, SALE's own setting "
            "and every tile kept are always there.",
        ),
    ] = "all",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JSON",
            help="A further setting, or, without its main parameter, a whole ladder; repeat.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="A profile of this model, as a method of its own; repeat."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens of the prompts.")
    ] = "4096,8192,16384",
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="all|N,N,...",
            help="Layers of the model. Default: every 6th of those that can be sparse.",
            show_default=False,
        ),
    ] = None,
    error: Annotated[
        str,
        typer.Option(
            metavar="X,X,...",
            help="Errors to reach, relative L1. The first is that of the summary and the pictures.",
        ),
    ] = "0.03,0.01",
    end_to_end: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also the perplexity under so many settings of each method: the one in the table, "
            "then those nearest the first error. The model is started and read for each.",
        ),
    ] = 0,
    end_to_end_length: Annotated[
        int | None,
        typer.Option(min=512, help="Of that, tokens. Default: the longest of --lengths."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help=f"Of that: {', '.join(LIKELIHOOD)}. Default: {TASKS}."
        ),
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help=f"Of that, of each task. Default: {DOCUMENTS}.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times are medians of so many.")] = 3,
    blocks: Annotated[
        int, typer.Option(min=1, help="Blocks of 64 queries of a prompt whose errors are measured.")
    ] = 16,
    threads: Annotated[int, typer.Option(min=1, help="That compute what is timed.")] = 1,
    seed: Annotated[int, typer.Option(help="Another gives other documents of the text.")] = 0,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    hf_overrides: HfOverrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path(
        "compare.html"
    ),
    json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, not a table.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """Compare methods: what error each has for how much time, on one kernel, on your model.

    Reads your text through vLLM once, every tile kept, chunks, RoPE and all,
    and writes down what some layers attend with. On that every method is run
    over its settings by this package's kernel, in turn with vLLM's own
    attention (CPU_ATTN): error, worst rows, recall, density, seconds with and
    without choosing tiles. The page has the frontier of error against time, the
    time to reach each error, the length from which on a method is faster than
    dense, and says in words where the default stands. A list selector that is
    installed appears by itself.

    What was measured stays in a folder beside the page (.parts), a file a
    setting: an interrupted comparison goes on from there, and more methods,
    lengths or layers measure only those. It also holds what was read of the
    model (2 kB a token and layer of SmolLM2); delete it when you are done.

    \b
    Examples:
      vllm-sparse compare ./model --text src/
      vllm-sparse compare ./model --text src/ --methods strided,static --lengths 8192
      vllm-sparse compare ./model --text src/ --end-to-end 1 --end-to-end-length 8192
      vllm-sparse compare ./model --text src/ --profile profile.json --markdown
      vllm-sparse compare ./model --text src/ \\
        --policy '{"selector": "sale", "local": 768}'

    \b
    Exit status:
      0    measured, and the page is written
      2    it did not run, or could not be finished; the message says why
      130  interrupted
    """
    parts = output.with_suffix(PARTS)
    with errors_named(
        f"interrupted; what was measured stays in {parts}, and the same command goes on from there"
    ):
        if json and markdown:
            raise Refused("--json, --markdown: want one of them")
        if output.suffix.lower() != ".html":
            raise Refused(f"-o {output}: want a name ending in .html")
        if not output.parent.is_dir():
            raise Refused(f"-o {output}: there is no folder {output.parent}")
        # Text options before anything heavy is imported: they are wrong at once.
        given: dict[str, Any] = {
            "tasks": _tasks(TASKS if tasks is None else tasks),
            "lengths": tuple(parse_lengths(lengths)),
            "errors": _errors(error),
            "hf_overrides": json_object(hf_overrides, "--hf-overrides"),
        }
        if not end_to_end:
            _unused(
                {
                    "--tasks": tasks,
                    "--documents": documents,
                    "--end-to-end-length": end_to_end_length,
                }
            )
        from vllm_sparse_backend.config import refuse_overrides

        refuse_overrides()
        from vllm_sparse_backend.compare.conduct import Asked, conduct

        asked = Asked(
            model=model,
            text=tuple(text),
            methods=methods,
            policies=tuple(map(_policy, policy or [])),
            profiles=tuple(profile or []),
            layers=layers,
            end_to_end=end_to_end,
            end_to_end_length=end_to_end_length,
            documents=documents or DOCUMENTS,
            repeats=repeats,
            blocks=blocks,
            threads=threads,
            seed=seed,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            parts=parts,
            **given,
        )
        # vLLM writes its log to stdout, which is the results'.
        with contextlib.redirect_stdout(sys.stderr):
            comparison = conduct(asked, shlex.join(["vllm-sparse", *sys.argv[1:]]))
        _write(comparison, output)
        for line in comparison.disturbed:
            typer.echo(f"disturbed: {line}", err=True)
        if json:
            typer.echo(comparison.model_dump_json(indent=2))
        else:
            _show(comparison, markdown)
        typer.echo(f"page: {output}; data: {output.with_suffix('.json')}", err=True)


def _unused(given: dict[str, Any]) -> None:
    """Raises Refused for an option of --end-to-end that was given without it."""
    for name, value in given.items():
        if value is not None:
            raise Refused(f"{name}: want --end-to-end with it, whose option it is")


def _tasks(text: str) -> tuple[Task, ...]:
    asked = [part.strip() for part in text.split(",")]
    if not asked or not set(asked) <= set(map(str, LIKELIHOOD)):
        raise Refused(f"--tasks: want some of {', '.join(LIKELIHOOD)}, got {text!r}")
    return tuple(Task(part) for part in dict.fromkeys(asked))


def _errors(text: str) -> tuple[float, ...]:
    try:
        errors = [float(part) for part in text.split(",")]
    except ValueError:
        errors = []
    if not errors or not all(0 < error <= 1 for error in errors):
        raise Refused(
            f"--error: want numbers above 0 and up to 1 with commas between them, got {text!r}"
        )
    return tuple(dict.fromkeys(errors))


def _policy(text: str) -> AnyPolicy:
    from pydantic import ValidationError

    from vllm_sparse_backend.errors import describe
    from vllm_sparse_backend.selection import parse_policy

    try:
        return parse_policy(json_object(text, "--policy") or {})
    except ValidationError as error:
        raise Refused(f"--policy {text}: {describe(error)}") from None


def _write(comparison: Comparison, output: Path) -> None:
    from vllm_sparse_backend.compare.page import render_html

    try:
        data = comparison.model_dump_json(indent=1) + "\n"
        output.with_suffix(".json").write_text(data, encoding="utf-8")
        output.write_text(render_html(comparison), encoding="utf-8")
    except OSError as error:
        raise Refused(f"-o {output}: {error.strerror}") from None


def _show(comparison: Comparison, markdown: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from vllm_sparse_backend.compare import table, verdict

    if markdown:
        typer.echo(table.markdown(comparison))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table.said(comparison), markup=False, soft_wrap=True)
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for place, heading in enumerate(table.headings(comparison)):
        made.add_column(heading, justify="right" if place > 1 else "left")
    for row in table.rows(comparison):
        made.add_row(*row)
    console.print(made)
    for line in verdict.summary(comparison):
        console.print(line, markup=False, soft_wrap=True)
