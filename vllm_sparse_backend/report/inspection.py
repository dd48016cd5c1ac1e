"""`vllm-sparse inspect`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vllm_sparse_backend.options import Refused, errors_named, json_object


def inspect(
    profile: Annotated[Path, typer.Argument(help="The profile's file.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The picture, SVG or PNG by its name. Default: the profile's name with .svg, "
            "here; with --json, none.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table, one entry a head.")
    ] = False,
    attention: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="LAYER HEAD",
            help="Draw this head's attention over --text instead, with the tiles that its policy "
            "keeps.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="With --attention: the file of text that is read.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="With --attention: the profile's model. Default: the demo's, "
            "SmolLM2-135M-Instruct.",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens. With --attention, of the text that is read, by default 2048 or all there "
            "are; else, of the prompt whose densities are shown, by default the longest measured.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="With --attention: what the model computes in. auto: as in the demo."),
    ] = "auto",
    hf_overrides: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="With --attention: vLLM's --hf-overrides."),
    ] = None,
) -> None:
    """Show what a profile does with each head: its policy and its density.

    A table on the terminal and a picture. Densities come from the measurement
    that `vllm-sparse calibrate` leaves beside a profile (NAME.measurement.json);
    without one, policies are shown alone. With --attention, one head is looked
    at on a text: where its attention is, which tiles are kept, and what is
    missed.

    \b
    Examples:
      vllm-sparse inspect profile.json
      vllm-sparse inspect profile.json --length 16384 -o heads.png
      vllm-sparse inspect profile.json --attention 12 3 --text book.txt --model ./model

    \b
    Exit status:
      0    shown
      2    not possible: the message says what is wrong with which input
      130  interrupted
    """
    with errors_named():
        from vllm_sparse_backend.profile import load_profile

        loaded = load_profile(profile)
        if attention is None:
            needing = {"--text": text, "--model": model, "--hf-overrides": hf_overrides}
            for option, value in needing.items():
                if value is not None:
                    raise Refused(f"{option}: only with --attention LAYER HEAD")
            if dtype != "auto":
                raise Refused("--dtype: only with --attention LAYER HEAD")
            _inspect_heads(loaded, profile, output, json, length)
        else:
            if text is None:
                raise Refused("--attention: want --text FILE as well")
            from vllm_sparse_backend.config import refuse_overrides

            refuse_overrides()
            overrides = json_object(hf_overrides, "--hf-overrides")
            _inspect_attention(
                loaded, attention, text, model, output, json, length, dtype, overrides
            )


def _inspect_heads(
    profile: Any, path: Path, output: Path | None, json: bool, length: int | None
) -> None:
    from vllm_sparse_backend.report.heads import inspect_profile
    from vllm_sparse_backend.report.measured import find

    inspection = inspect_profile(profile, find(profile, path), length)
    if not (json and output is None):
        from vllm_sparse_backend.report.heads_plot import heads_figure
        from vllm_sparse_backend.report.svg import check, save

        output = output or Path(_file_name(profile.name) + ".svg")
        check(output)
        save(heads_figure(inspection), output)
    if json:
        typer.echo(inspection.model_dump_json(indent=2))
    else:
        from rich.console import Console

        from vllm_sparse_backend.report.heads_table import print_heads

        print_heads(inspection, Console(highlight=False))
    _say_where(output)


def _inspect_attention(
    profile: Any,
    place: tuple[int, int],
    text: Path,
    model: str | None,
    output: Path | None,
    json: bool,
    length: int | None,
    dtype: str,
    overrides: dict[str, Any] | None,
) -> None:
    layer, head = place
    facts = profile.model
    for what, number, count in (
        ("layer", layer, facts.num_layers), ("head", head, facts.num_heads),
    ):  # fmt: skip
        if not 0 <= number < count:
            raise Refused(
                f"--attention: want a {what} from 0 to {count - 1}, got {number} "
                f"(profile {profile.name!r})"
            )
    from vllm_sparse_backend.report.svg import check

    wanted = output or Path(f"{_file_name(profile.name)}-layer{layer}-head{head}.svg")
    if not (json and output is None):
        check(wanted)
        import matplotlib  # noqa: F401  (missing: say so now, not after a minute of computing)
    from vllm_sparse_backend.report.capture import look_at

    found = look_at(
        profile, layer, head, text, model=model, length=length, dtype=dtype, overrides=overrides
    )
    if not (json and output is None):
        from vllm_sparse_backend.report.attention_plot import attention_figure
        from vllm_sparse_backend.report.svg import save

        save(attention_figure(found), wanted)
    if json:
        typer.echo(found.summary().model_dump_json(indent=2))
    else:
        typer.echo(found.summary().describe())
    _say_where(None if json and output is None else wanted)


def _say_where(picture: Path | None) -> None:
    if picture is not None:
        typer.echo(f"picture: {picture}", err=True)


def _file_name(name: str) -> str:
    """A name made fit for a file, whatever a profile is called."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "profile"
