"""`vllm-sparse import` and `vllm-sparse export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_sparse_backend.options import errors_named


def import_command(
    file: Annotated[Path, typer.Argument(help="Another project's file.")],
    model: Annotated[
        str, typer.Option(help="The model it is of: a folder or name, as `vllm serve` takes it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile's file to write.")],
    source: Annotated[
        Literal["auto", "minference", "modelopt"],
        typer.Option(
            "--from",
            help="minference: a pattern file; modelopt: a config.json with Model Optimizer's "
            "sparse_attention_config. auto: seen from the contents.",
        ),
    ] = "auto",
    unsupported: Annotated[
        Literal["error", "dense"],
        typer.Option(
            help="What becomes of an algorithm of Model Optimizer's that no selector here computes."
        ),
    ] = "error",
) -> None:
    """Make a profile of MInference's patterns or Model Optimizer's skip-softmax calibration."""
    from vllm_sparse_backend.doctor import model_facts
    from vllm_sparse_backend.exchange import import_profile

    with errors_named():
        made = import_profile(
            file, model_facts(model), None if source == "auto" else source, unsupported
        )
        made.profile.save(output)
    for note in made.notes:
        typer.echo(note)
    typer.echo(f"written: {output} ({made.profile.digest})")


def export_command(
    profile: Annotated[Path, typer.Argument(help="The profile's file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    target: Annotated[
        Literal["minference"], typer.Option("--to", help="minference: a pattern file.")
    ],
) -> None:
    """Write a profile for another project, if all of its heads can be said there."""
    from vllm_sparse_backend.exchange import minference
    from vllm_sparse_backend.profile import load_profile

    with errors_named():
        loaded = load_profile(profile)
        output.write_text(minference.write(loaded), encoding="utf-8")
    typer.echo(f"written: {output} ({target}, {loaded.model.num_layers} layers)")
