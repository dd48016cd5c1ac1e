"""`vllm-sparse report`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_sparse_backend.options import Refused, errors_named, file_named

if TYPE_CHECKING:
    from vllm_sparse_backend.evaluate.results import Evaluation
    from vllm_sparse_backend.profile import Profile
    from vllm_sparse_backend.report.measured import Found


def report(
    profile: Annotated[Path, typer.Option(help="The profile's file.", show_default=False)],
    measurement: Annotated[
        Path | None,
        typer.Option(
            help="Its measurement. Default: NAME.measurement.json beside it, if there is one."
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="An evaluation with this profile (eval.json); repeat."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Make one HTML page of a profile's calibration and evaluations.

    Self-contained: pictures are in it, scripts are not. What was not measured
    is left out, with a line that says what would make it.

    \b
    Examples:
      vllm-sparse report --profile profile.json
      vllm-sparse report --profile profile.json --eval eval.json -o report.html

    \b
    Exit status:
      0    written
      2    not possible: the message says what is wrong with which input
    """
    with errors_named():
        from vllm_sparse_backend.profile import load_profile

        loaded = load_profile(profile)
        found = _measurement(loaded, profile, measurement)
        made = [_evaluation(loaded, path) for path in evaluations or []]
        from vllm_sparse_backend.report.page import Inputs, render_html

        page = render_html(Inputs(loaded, profile.name, found, made))
        try:
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise Refused(f"-o {output}: {error.strerror}") from None
        if found.measurement is None:
            typer.echo(f"no densities: {found.why_not}", err=True)
        typer.echo(f"report: {output}", err=True)


def _measurement(profile: Profile, path: Path, given: Path | None) -> Found:
    from vllm_sparse_backend.report.measured import Found, find, load_measurement

    if given is None:
        return find(profile, path)
    measurement = load_measurement(given)
    if measurement.digest != profile.digest:
        raise Refused(
            f"--measurement {given}: of profile {measurement.name!r} ({measurement.digest}), "
            f"want one of {profile.digest}"
        )
    return Found(given, measurement)


def _evaluation(profile: Profile, path: Path) -> Evaluation:
    from vllm_sparse_backend.evaluate.results import SCHEMA, load_evaluation

    with file_named(f"--eval {path}"):
        evaluation = load_evaluation(path)
    if evaluation.evaluation_schema != SCHEMA:
        raise Refused(
            f"--eval {path}: want evaluation_schema {SCHEMA}, got {evaluation.evaluation_schema}"
        )
    if evaluation.profile_digest != profile.digest:
        raise Refused(
            f"--eval {path}: made with profile {evaluation.profile!r} "
            f"({evaluation.profile_digest or 'no digest'}), want {profile.digest}"
        )
    return evaluation
