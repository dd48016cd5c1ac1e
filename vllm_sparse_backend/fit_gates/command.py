"""`vllm-sparse fit-gates`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from vllm_sparse_backend.options import ChunkTokens, Dtype, HfOverrides, Refused, errors_named

SHORTEST = 512  # tokens of a document, 8 blocks


def fit_gates(
    model: Annotated[
        str, typer.Argument(help="A model's folder or name, as `vllm serve` takes it.")
    ],
    text: Annotated[
        list[Path],
        typer.Option(help="A file or folder of text like that which will be served; repeat."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The gates' file.")] = Path(
        "gates.safetensors"
    ),
    length: Annotated[int, typer.Option(min=SHORTEST, help="Tokens of a document.")] = 4096,
    documents: Annotated[
        int, typer.Option(min=2, help="Made of the text; the last is kept aside to judge by.")
    ] = 17,
    steps: Annotated[int, typer.Option(min=1, help="Of gradient descent, in each layer.")] = 400,
    seed: Annotated[int, typer.Option(help="Another gives other documents of the text.")] = 0,
    chunk_tokens: ChunkTokens = None,
    dtype: Dtype = "auto",
    hf_overrides: HfOverrides = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, not a line.")
    ] = False,
) -> None:
    """Teach the gates of the selector `seer`, one per head, what a model's attention looks at.

    Reads documents of your text through vLLM itself, pools the true attention of
    every layer and head by blocks of 64, and fits each head's two matrices to it
    (SeerAttention, arXiv 2410.13276). Minutes for a small model. What changes the
    model's RoPE (--hf-overrides) must be the same here as where it is served.

    \b
    Example:
      vllm-sparse fit-gates ./model --text src/ -o gates.safetensors

    \b
    Then, in a profile or for every head:
      vllm serve ./model --attention-backend sparse_prefill --additional-config \\
        '{"sparse_prefill": {"policy": {"selector": "seer", "gates": "gates.safetensors"}}}'

    \b
    Exit status:
      0    the gates are written
      2    it did not run, or could not be finished; the message says why
      130  interrupted
    """
    # vLLM writes its log to stdout, which is the results'.
    with redirect_stdout(sys.stderr), errors_named("interrupted; nothing is written"):
        from vllm_sparse_backend.config import refuse_overrides

        refuse_overrides()
        from transformers import AutoTokenizer

        from vllm_sparse_backend.calibrate.documents import make_documents
        from vllm_sparse_backend.calibrate.run import look_at
        from vllm_sparse_backend.demo.machine import fast_dtype
        from vllm_sparse_backend.demo.model import ensure_model
        from vllm_sparse_backend.demo.plan import read_facts
        from vllm_sparse_backend.fit_gates.run import Wanted, fit, work
        from vllm_sparse_backend.offline import EngineOptions, kv_gib
        from vllm_sparse_backend.options import json_object
        from vllm_sparse_backend.selection.gates import BLOCK
        from vllm_sparse_backend.tasks.catalog import Task
        from vllm_sparse_backend.tasks.source import names_of, read_sources
        from vllm_sparse_backend.tasks.stream import TokenStream

        chunk = chunk_tokens or 2048
        if chunk % BLOCK:
            raise Refused(f"--chunk-tokens: want a multiple of {BLOCK}, got {chunk}")
        overrides = json_object(hf_overrides, "--hf-overrides")
        path = ensure_model(model)
        positions = (overrides or {}).get(
            "max_position_embeddings", read_facts(path, packaged=False).max_positions
        )
        if length > positions:
            raise Refused(f"--length: the model has {positions} positions, got {length}")
        sources = read_sources(text)
        streams = [TokenStream(AutoTokenizer.from_pretrained(path), source) for source in sources]
        made = make_documents(streams, [Task.TEXT], [length], documents, seed)
        look = look_at(str(path), dtype, overrides)
        chosen_dtype = fast_dtype() if dtype == "auto" else dtype
        wanted = Wanted(
            options=EngineOptions(
                model=str(path),
                max_model_len=length,
                chunk_tokens=chunk,
                dtype=chosen_dtype,
                hf_overrides=overrides,
                kv_gib=kv_gib(look.facts, length, chosen_dtype),
            ),
            texts=names_of(sources),
            length=length,
            steps=steps,
            seed=seed,
            output=output,
        )
        from tqdm import tqdm

        with tqdm(total=work(wanted, look, made), desc="fit-gates", unit="step") as bar:
            summary = fit(wanted, look, made, bar.update)
    if json:
        typer.echo(summary.model_dump_json(indent=2))
    else:
        typer.echo(
            f"gates: {output} ({summary.digest}); from attention {summary.taught:.3f} nats on text "
            f"kept aside, {summary.untaught:.3f} untaught; {summary.seconds / 60:.1f} minutes"
        )
