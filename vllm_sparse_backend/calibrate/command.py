"""`vllm-sparse calibrate`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vllm_sparse_backend.options import (
    ChunkTokens,
    Dtype,
    HfOverrides,
    Names,
    Refused,
    Target,
    check_output,
    errors_named,
    json_object,
    parse_lengths,
    parse_names,
)

if TYPE_CHECKING:
    from vllm_sparse_backend.calibrate.candidates import Ladder
    from vllm_sparse_backend.calibrate.results import Measurement
    from vllm_sparse_backend.calibrate.run import Model, Progress

# What bounds each rule, and its default.
BUDGETS = {
    "head": ("--error", 0.02),
    "global": ("--error", 0.02),
    "loss": ("--error", 0.02),
    "sale": ("--theta", 0.4),
    "minference": ("--work", 0.25),
}
METHODS = "sale,mass,static"  # of rule sale: sale
CHUNK_TOKENS = 2048
LENGTHS = (4096, 8192)
SHORTEST = 2304  # tokens; up to `min_prompt_tokens`, 2048, nothing is sparse


def calibrate(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name, as `vllm serve` takes it.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(help="A file or folder of text like that which will be served; repeat."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile's file.")] = Path(
        "profile.json"
    ),
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens of the documents made of the text. Default: 4096,8192, as far as the "
            "model goes.",
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="The error budget of rules head, global and loss: relative L1 of a head's output "
            "against dense attention, in every kind of text at every length. 0: all dense; 1: as "
            "little as there is. Default: 0.02.",
        ),
    ] = None,
    tail_error: Annotated[
        float,
        typer.Option(
            help="The same for the worst 1% of a head's rows, of the same rules; 0: no bound.",
        ),
    ] = 0.0,
    rule: Annotated[
        Literal["head", "global", "loss", "sale", "minference"],
        typer.Option(
            help="head: every head within the budget. global: their mean within it, spent where "
            "it buys most. loss: the same, and what the errors do to the model's prediction "
            "counts with them. sale: SALE's own, with --theta. minference: the least error for "
            "--work."
        ),
    ] = "head",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="all|NAME,...",
            help="Selectors that a head may get, list selectors among them; -NAME leaves one out: "
            "all,-hip. They take longer: each setting of theirs chooses tiles for all of every "
            f"document. Default: {METHODS}, or, of rule sale, sale, which is all that it has.",
        ),
    ] = None,
    theta: Annotated[
        float | None,
        typer.Option(help="Of rule sale: absolute error per row. Default: 0.4."),
    ] = None,
    work: Annotated[
        float | None,
        typer.Option(help="Of rule minference: time over that of dense, 0 to 1. Default: 0.25."),
    ] = None,
    copies: Annotated[
        bool, typer.Option(help="Also read text that is said twice, which copying heads need.")
    ] = True,
    retrieval: Annotated[
        bool, typer.Option(help="Also read key-value pairs that are asked for.")
    ] = True,
    documents: Annotated[int, typer.Option(min=1, help="Of each kind and length.")] = 1,
    blocks: Annotated[
        int, typer.Option(min=1, help="Blocks of 64 queries measured of a document.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Another gives other documents of the text.")] = 0,
    as_served: Annotated[
        bool,
        typer.Option(
            "--as-served",
            help="Measure once more behind the profile found first, so that the errors of earlier "
            "layers are part of what a layer is measured on; twice the time.",
        ),
    ] = False,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    hf_overrides: HfOverrides = None,
    target: Target = None,
    name: Annotated[
        str | None, typer.Option(help="The profile's name. Default: the model's.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the measurement as JSON, not a table.")
    ] = False,
) -> None:
    """Fit a profile to a model: the cheapest policy of each head within an error budget.

    Reads documents made of your text through vLLM itself, chunks, RoPE and all,
    and measures in every layer and head what each threshold of each selector
    would do to the output, exactly, on blocks of queries from the whole length.
    Writes the profile and, beside it, what was measured (.measurement.json).

    What was measured of a document stays in a folder beside the profile (.parts):
    an interrupted calibration goes on from there, and another --error or --rule
    chooses anew without reading anything again. Delete it when you are done.

    \b
    Examples:
      vllm-sparse calibrate ./model --text src/ --text notes.txt -o profile.json
      vllm-sparse calibrate ./model --text src/ --lengths 8192,32768 --error 0.01
      vllm-sparse calibrate ./model --text src/ --rule loss --error 0.06
      vllm-sparse calibrate ./model --text src/ --rule sale --theta 0.4
      vllm-sparse calibrate ./model --text src/ --methods all --rule global
      vllm-sparse calibrate ./model --text src/ --target sm_90

    \b
    Then:
      vllm-sparse eval ./model --profile profile.json
      vllm serve ./model --attention-backend sparse_prefill \\
        --additional-config '{"sparse_prefill": {"profile": "profile.json"}}'

    \b
    Exit status:
      0    the profile is written
      2    it did not run, or could not be finished; the message says why
      130  interrupted
    """
    with errors_named():
        parts = _check_output(output)
    # vLLM writes its log to stdout, which is the results'.
    with (
        redirect_stdout(sys.stderr),
        errors_named(
            f"interrupted; what was measured stays in {parts}, and the same command goes on from "
            "there"
        ),
    ):
        from vllm_sparse_backend.config import refuse_overrides

        refuse_overrides()
        from vllm_sparse_backend import target as targets

        targets.check(target)
        from vllm_sparse_backend.calibrate.documents import make_documents
        from vllm_sparse_backend.calibrate.rules import Rule
        from vllm_sparse_backend.calibrate.run import Wanted, look_at
        from vllm_sparse_backend.calibrate.run import calibrate as run
        from vllm_sparse_backend.demo.machine import fast_dtype
        from vllm_sparse_backend.demo.model import ensure_model
        from vllm_sparse_backend.demo.plan import read_facts
        from vllm_sparse_backend.demo.progress import warn_if_busy
        from vllm_sparse_backend.offline import EngineOptions, kv_gib
        from vllm_sparse_backend.tasks.catalog import Task
        from vllm_sparse_backend.tasks.source import names_of, read_sources
        from vllm_sparse_backend.tasks.stream import TokenStream

        budget = _budget(rule, {"--error": error, "--theta": theta, "--work": work})
        _check_number("--tail-error", tail_error, inf)
        if tail_error and rule in ("sale", "minference"):
            raise Refused(f"--tail-error: rule {rule} has no use for it")
        asked = _methods(methods, rule)
        overrides = json_object(hf_overrides, "--hf-overrides")
        path = ensure_model(model)
        facts = read_facts(path, packaged=False)
        positions = (overrides or {}).get("max_position_embeddings", facts.max_positions)
        chosen = _lengths(lengths, positions)
        from transformers import AutoTokenizer

        sources = read_sources(text)
        streams = [TokenStream(AutoTokenizer.from_pretrained(path), source) for source in sources]
        kinds = [
            Task.TEXT,
            *([Task.COPY] if copies else []),
            *([Task.RECORDS] if retrieval else []),
        ]
        prompts = make_documents(streams, kinds, chosen, documents, seed)
        look = look_at(str(path), dtype, overrides)
        whose = targets.of(target, look.facts, chunk_tokens)
        usable, ladders = _usable(asked, look, whose.name)
        chosen_dtype = fast_dtype() if dtype == "auto" else dtype
        wanted = Wanted(
            options=EngineOptions(
                model=str(path),
                max_model_len=max(chosen),
                chunk_tokens=chunk_tokens or CHUNK_TOKENS,
                dtype=chosen_dtype,
                hf_overrides=overrides,
                kv_gib=kv_gib(look.facts, max(chosen), chosen_dtype),
            ),
            name=name or path.name,
            texts=names_of(sources),
            lengths=tuple(chosen),
            rule=Rule(rule),
            budget=budget,
            tail=tail_error or float("inf"),
            blocks=blocks,
            seed=seed,
            output=output,
            target=whose,
            as_served=as_served,
            methods=usable,
            ladders=ladders,
        )
        warn_if_busy()
        with _bar(len(prompts) * (1 + as_served) + (rule == "loss")) as progress:
            _, measurement = run(wanted, look, prompts, progress)
    if json:
        typer.echo(measurement.model_dump_json(indent=2))
    else:
        _show(measurement)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    minutes = measurement.seconds / 60
    typer.echo(f"profile: {output}; {minutes:.1f} minutes, {peak:.1f} GiB of memory", err=True)


def _budget(rule: str, given: dict[str, float | None]) -> float:
    """What bounds a rule. Raises Refused if another rule's bound was given, or no number."""
    option, default = BUDGETS[rule]
    for name, value in given.items():
        if value is not None and name != option:
            raise Refused(f"{name}: rule {rule} has no use for it; want {option}")
        if value is not None:
            _check_number(name, value, inf if name == "--theta" else 1)
    budget = given[option]
    return default if budget is None else budget


def _check_number(option: str, value: float, most: float) -> None:
    """Raise Refused for one out of range, and for NaN, which is in no range and beyond none."""
    if not (isfinite(value) and 0 <= value <= most):
        upto = "on" if most == inf else f"to {most:g}"
        raise Refused(f"{option}: want a number from 0 {upto}, got {value:g}")


def _methods(text: str | None, rule: str) -> Names:
    """The selectors that are named. Raises Refused and SelectorError."""
    from vllm_sparse_backend.calibrate.candidates import FUSED
    from vllm_sparse_backend.selection import registry

    if text is None:
        text = "sale" if rule == "sale" else METHODS
    methods = parse_names(text, [*FUSED, *sorted(registry.known())])
    if rule == "sale" and methods.taken != ["sale"]:
        raise Refused(f"--methods {text}: rule sale chooses thresholds of sale; want sale alone")
    return methods


def _usable(methods: Names, look: Model, target: str) -> tuple[tuple[str, ...], tuple[Ladder, ...]]:
    """The selectors that heads may get, and the ladders to measure. Of "all" those are left out
    that have no settings, miss a file, or take a time that is not known on the target, with a line
    that says so. Raises Refused for one that was named, and SelectorError."""
    from vllm_sparse_backend.calibrate.candidates import (
        FUSED,
        ladders_of,
        list_ladder,
        why_unusable,
    )
    from vllm_sparse_backend.demo.progress import note
    from vllm_sparse_backend.target import why_untimed

    usable = []
    for name in methods.taken:
        try:
            why = None
            if name not in FUSED:
                its = list_ladder(name)
                why = why_untimed(target) or why_unusable(its, look.facts, look.sparse_layers)
        except Refused as error:
            why = str(error)
        if why is None:
            usable.append(name)
        elif name in methods.asked:
            raise Refused(f"--methods {name}: {why}")
        else:
            note(f"left out: {name}: {why}")
    return tuple(usable), ladders_of(usable)


def _check_output(output: Path) -> Path:
    """The folder of what will be measured. Raises Refused unless all can be written."""
    from vllm_sparse_backend.calibrate.results import PARTS, measurement_of, parts_of

    check_output(output)
    if output.suffix == PARTS:
        raise Refused(
            f"--output {output}: want another ending than {PARTS}, the folder's of what is measured"
        )
    check_output(measurement_of(output))
    parts = parts_of(output)
    if parts.exists():
        check_output(parts / "document")
    return parts


def _lengths(text: str | None, positions: int) -> list[int]:
    """Those that were named, or the default as far as the model goes. Raises Refused."""
    from vllm_sparse_backend.demo.progress import note

    if text is not None:
        lengths = parse_lengths(text)
        check_lengths(lengths, positions)
        return lengths
    if positions < SHORTEST:
        raise Refused(
            f"the model has {positions} positions; want at least {SHORTEST}, below which hardly "
            "anything is sparse"
        )
    lengths = sorted({min(length, positions) for length in LENGTHS})
    if lengths != list(LENGTHS):
        note(f"--lengths: {','.join(map(str, lengths))}, since the model has {positions} positions")
    return lengths


def check_lengths(lengths: list[int], positions: int) -> None:
    """Raise Refused unless something of all prompts is sparse and the model takes them."""
    for length in lengths:
        if length < SHORTEST:
            raise Refused(
                f"--lengths: want at least {SHORTEST}, below which hardly anything is sparse, "
                f"got {length}"
            )
        if length > positions:
            raise Refused(
                f"--lengths: the model has {positions} positions, got {length}; scaling its RoPE "
                'takes --hf-overrides \'{"rope_parameters": {...}, "max_position_embeddings": N}\''
            )


def _show(measurement: Measurement) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from vllm_sparse_backend.target import is_gpu

    table = Table(
        "tokens", "density", "error", "worst 1%", "recall", "attention, predicted",
        title=f"{measurement.name}, rule {measurement.rule}, budget {measurement.budget:g}",
    )  # fmt: skip
    for length, seconds in measurement.predicted.items():
        its = [head.figures[length] for head in measurement.heads]

        def mean(name: str, its: list[Any] = its) -> float:
            return sum(getattr(one, name) for one in its) / len(its)

        table.add_row(
            f"{length:,}",
            f"{mean('density'):.3f}",
            f"{mean('error'):.4f}",
            f"{mean('tail'):.3f}",
            f"{mean('recall'):.4f}",
            f"{seconds.speedup()} x {measurement.base}",
        )
    Console(highlight=False).print(table)
    if is_gpu(measurement.isa):
        typer.echo(f"attention: of {measurement.whose}")
    counted = Counter(head.policy.selector for head in measurement.heads)
    typer.echo("heads: " + ", ".join(f"{count} {name}" for name, count in counted.most_common()))


@contextmanager
def _bar(documents: int) -> Iterator[Progress]:
    """A bar of the documents, each as long as its layers and chunks are many."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from vllm_sparse_backend.calibrate.run import Progress
    from vllm_sparse_backend.demo.progress import console

    with Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    ) as bar:  # fmt: skip
        whole = bar.add_task("documents", total=documents)
        one = bar.add_task("", visible=False)

        class Shown(Progress):
            def document(self, name: str, steps: int, reused: bool) -> None:
                if reused:
                    bar.advance(whole)
                    return
                bar.reset(one, description=name, total=steps, visible=True)

            def advance(self) -> None:
                bar.advance(one)

            def finished(self) -> None:
                bar.update(one, completed=bar.tasks[one].total)
                bar.advance(whole)

        yield Shown()
