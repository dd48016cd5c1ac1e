"""The command `vllm-sparse`. Imports neither torch nor vLLM before a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from vllm_sparse_backend import __version__
from vllm_sparse_backend.calibrate.command import calibrate
from vllm_sparse_backend.compare.command import compare_
from vllm_sparse_backend.demo.command import demo, serve_demo
from vllm_sparse_backend.evaluate.command import evaluate_
from vllm_sparse_backend.exchange.command import export_command, import_command
from vllm_sparse_backend.fit_gates.command import fit_gates
from vllm_sparse_backend.report.command import report
from vllm_sparse_backend.report.estimation import estimate
from vllm_sparse_backend.report.inspection import inspect

if TYPE_CHECKING:
    from vllm_sparse_backend.doctor import Diagnosis, Model

app = typer.Typer(
    help="Sparse prefill for vLLM: what is installed, profiles, and a demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command("serve-demo")(serve_demo)
app.command("eval")(evaluate_)
app.command("import")(import_command)
app.command("export")(export_command)
app.command()(inspect)
app.command()(calibrate)
app.command("fit-gates")(fit_gates)
app.command("compare")(compare_)
app.command()(estimate)
app.command()(report)

ModelOption = Annotated[
    str | None, typer.Option(help="A model's folder or name, as `vllm serve` takes it.")
]
ProfileOption = Annotated[Path | None, typer.Option(help="A profile's file.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Sparse prefill for vLLM."""


@app.command()
def doctor(
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- VLLM_OPTIONS]",
            help="After --model and --: what else would stand behind `vllm serve`.",
        ),
    ] = None,
    model: ModelOption = None,
    profile: ProfileOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed and what would be used, or why not; exit 1 if something is wrong.

    With --model: whether each layer would be sparse, and under which profile.
    """
    if profile is not None and model is None:
        raise typer.BadParameter(
            "want --model as well; `vllm-sparse validate` takes a profile alone"
        )
    if options and model is None:
        raise typer.BadParameter(f"want --model before vLLM's options, got {' '.join(options)}")
    from vllm_sparse_backend.doctor import examine

    diagnosis = examine(model, None if profile is None else str(profile), options or ())
    if json:
        typer.echo(diagnosis.model_dump_json(indent=2))
    else:
        for name, value in _lines(diagnosis):
            typer.echo(f"{name:<12} {value}")
    raise typer.Exit(1 if diagnosis.problems else 0)


@app.command()
def validate(
    profile: Annotated[Path, typer.Argument(help="The profile's file.")],
    model: ModelOption = None,
) -> None:
    """Check a profile's file and, with --model, whether it fits; exit 1 if not."""
    from vllm_sparse_backend.errors import SparsePrefillError
    from vllm_sparse_backend.profile import load_profile

    try:
        loaded = load_profile(profile)
    except SparsePrefillError as error:
        _fail(str(error))
    if model is not None:
        from vllm_sparse_backend.doctor import examine

        served = examine(model, str(profile)).model
        if served is None:
            _fail("the model cannot be looked at here; `vllm-sparse doctor` says why")
        if served.problem:
            _fail(served.problem)
    facts = loaded.model
    heads = sum(len(heads) for heads in loaded.policies.values())
    typer.echo(
        f"valid: {loaded.name} ({loaded.digest}), of {facts.architecture} with "
        f"{facts.num_layers} layers of {facts.num_heads} heads; {heads} entries besides the "
        f"defaults{'' if model is None else f'; fits {model}'}"
    )


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _lines(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    lines = [
        ("package", f"vllm-sparse-backend {diagnosis.package}"),
        ("vLLM", f"{diagnosis.vllm} (supported: {diagnosis.vllm_wanted})"),
        ("torch", f"{diagnosis.torch}"),
        ("platform", f"{diagnosis.platform}"),
        ("backend", "registered" if diagnosis.registered else "not registered"),
        *_device_lines(diagnosis),
        *(
            ("selectors" if i == 0 else "", f"{name} = {value}")
            for i, (name, value) in enumerate(diagnosis.selectors.items())
        ),
        ("plugins", "all" if diagnosis.plugins is None else ",".join(diagnosis.plugins)),
        *((name, value) for name, value in diagnosis.environment.items()),
    ]
    if diagnosis.model is not None:
        lines += _model_lines(diagnosis.model)
    lines += [("faster" if i == 0 else "", text) for i, text in enumerate(diagnosis.advice)]
    problems = diagnosis.problems or ["none"]
    return lines + [("problems" if i == 0 else "", text) for i, text in enumerate(problems)]


def _device_lines(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    if (gpu := diagnosis.gpu) is not None:
        products = "in int8, of fp4 codes " + ("in fp4" if gpu.fp4 else "as well")
        kernels = f"Triton {gpu.triton}, scores {products}" if gpu.triton else "unusable"
        return [("GPU", f"{gpu.name}, compute capability {gpu.capability}"), ("kernels", kernels)]
    isas = diagnosis.core.isas.items()
    return [
        ("CPU core", f"{diagnosis.core.active or 'unusable'}"),
        ("", "compiled: " + ", ".join(i if usable else f"{i} (not here)" for i, usable in isas)),
    ]


def _model_lines(model: Model) -> list[tuple[str, str]]:
    lines = [("model", model.path)]
    if model.facts is not None:
        facts = model.facts
        lines.append(
            (
                "",
                f"{facts.architecture}, {facts.num_layers} layers, {facts.num_heads} heads, "
                f"{facts.num_kv_heads} kv heads, head_dim {facts.head_dim}",
            )
        )
        lines.append(("", f"{facts.digest}"))
    if model.profile is not None:
        lines.append(("policies", model.profile))
    by_path: dict[str, list[int]] = {}
    for layer in model.layers:
        by_path.setdefault(layer.path + (f": {layer.reason}" if layer.reason else ""), []).append(
            layer.index
        )
    lines += [("layers", f"{_ranges(layers)} {path}") for path, layers in by_path.items()]
    return lines + [("warning", text) for text in model.warnings]


def _ranges(numbers: list[int]) -> str:
    """0-3,5 for [0, 1, 2, 3, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
