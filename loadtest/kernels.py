"""The attention op against vLLM's own attention and torch's SDPA, interleaved in one process.

    python loadtest/kernels.py --shape llama --length 16384 --input random --policy dense
    python loadtest/kernels.py --shape smollm2 --length 8192 --input captured \\
        --policy '{"selector": "sale"}' --policy '{"selector": "mass", "tau": 0.003}'
    python loadtest/kernels.py --impl triton --shape llama --length 65536 --chunks 4 --json gpu.json
    python loadtest/kernels.py --shape llama --length 65536 --input generated --chunks 4 --plots out

Every repetition runs all contenders one after the other, so that a noisy machine is noisy for
all of them alike; ratios are of medians. On a GPU a call is one of several layers' that are
launched one after the other, its work planned before, as in a step of a server; the phases are
those of another run. No ratio is given for a result that is too far from exact
attention (--budget; for what keeps every tile 0.01), or that misses a needle.
"""

from __future__ import annotations

import json
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from capture import LAYERS, captured
from generate import generate
from inputs import SHAPES, Layer, Shape, plan_steps, random_layer
from machines import Machine, machine
from measure import Contender, console, measure
from quality import Task
from results import Report, draw, table
from rich.console import Console

from vllm_sparse_backend.profile import load_profile
from vllm_sparse_backend.selection import UNIFORM_DEFAULT, label, parse_policy

Input = StrEnum("Input", ["CAPTURED", "GENERATED", "RANDOM"])
SDPA_LIMIT = 16384  # tokens beyond which it takes minutes and tells nothing new


def _policy(text: str) -> Any:
    try:
        return parse_policy({"selector": text} if text.isidentifier() else json.loads(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}") from error


def heads_measured(shape: Shape, length: int, here: Machine) -> Shape:
    """As many of a layer's heads as are measured: all, unless it would take a CPU too long."""
    return shape if here.whole else shape.measured(length)


def _layers(
    kind: Input, name: str, shape: Shape, length: int, text: Task, seed: int
) -> list[Layer]:
    if kind is Input.CAPTURED:
        if name != "smollm2":
            raise typer.BadParameter(f"captured input: want the shape smollm2, got {name}")
        return captured(length, text)
    make = generate if kind is Input.GENERATED else random_layer
    return [make(shape, length, torch.bfloat16, seed)]


def main(
    shape: Annotated[list[str], typer.Option(help=f"{', '.join(SHAPES)}; repeat.")] = ["smollm2"],  # noqa: B006
    length: Annotated[list[int], typer.Option(min=64, help="Tokens; repeat.")] = [8192],  # noqa: B006
    kind: Annotated[
        Input, typer.Option("--input", help="captured: SmolLM2 on real text; generated: seeded.")
    ] = Input.GENERATED,
    text: Annotated[Task, typer.Option(help="Of captured input: code, docs or copy.")] = Task.CODE,
    policy: Annotated[
        list[Any] | None,
        typer.Option(parser=_policy, help="JSON or a selector's name; repeat. Beside keep-all."),
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(help="SmolLM2's, of captured input: a policy a head; repeat."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Only the last so many rows; 0: all.")] = 0,
    chunks: Annotated[
        int, typer.Option(help="In chunks of 2048, at most so many measured; 0: one call.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="0: as many as there are cores.")] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    impl: Annotated[
        str,
        typer.Option(
            help="cpu, against CPU_ATTN; or triton, on a GPU, against FLASH_ATTN, or TRITON_ATTN "
            "where vLLM has none."
        ),
    ] = "cpu",
    isa: Annotated[str | None, typer.Option(help="Force an instruction set.")] = None,
    budget: Annotated[float, typer.Option(help="Relative L1 beyond which no ratio.")] = 0.03,
    seed: Annotated[int, typer.Option(help="Of generated input.")] = 0,
    as_json: Annotated[str | None, typer.Option("--json", help="A file, or - for stdout.")] = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for pictures.")] = None,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if a ratio was refused.")] = False,
) -> None:
    """Speed, error and recall of the op under policies, beside vLLM's and torch's attention."""
    if unknown := set(shape) - set(SHAPES):
        raise typer.BadParameter(f"--shape: want {', '.join(SHAPES)}, got {unknown}")
    if impl not in ("cpu", "triton"):
        raise typer.BadParameter(f"--impl: want cpu or triton, got {impl}")
    for option, given in (("--isa", isa), ("--threads", threads if threads != 1 else None)):
        if given is not None and impl != "cpu":
            raise typer.BadParameter(f"{option}: is of --impl cpu, got {given} with {impl}")
    try:
        here = machine(impl, threads, isa)
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error
    if plots and not here.baselines:
        raise typer.BadParameter("--plots: want times that mean something, not an interpreter's")
    report = Report(
        impl=impl,
        baseline=next(iter(here.baselines), "none"),
        isa=here.name,
        features=here.features,
        threads=here.threads,
        dtype=dtype,
        peak_gops=here.peak_gops,
        versions={name: metadata.version(name) for name in ("torch", "vllm")},
    )
    if profile and kind is not Input.CAPTURED:
        raise typer.BadParameter(
            f"--profile: want captured input, whose layers are a model's, got {kind}"
        )
    profiles = [load_profile(path) for path in profile or []]
    uniform = [_policy("dense"), *(policy or ([] if profiles else [UNIFORM_DEFAULT]))]
    for name in shape:
        for tokens in length:
            console.print(f"{name}, {tokens:,} tokens, {kind}")
            model = measured = SHAPES[name]
            if kind is not Input.CAPTURED:
                measured = heads_measured(model, tokens, here)
            layers = [
                each.to(getattr(torch, dtype))
                for each in _layers(kind, name, measured, tokens, text, seed)
            ]
            heads = layers[0].q.shape[1]
            contenders: dict[str, Contender] = {
                label(each): [[each] * heads] * len(layers) for each in uniform
            }
            for each in profiles:
                contenders[each.name] = [each.for_layer(number) for number in LAYERS]
            plan = plan_steps(tokens, min(rows, tokens), chunks)
            with_sdpa = plan.steps[0].end == tokens and not rows and tokens <= SDPA_LIMIT
            report.cases.append(
                measure(
                    layers,
                    plan,
                    contenders,
                    here,
                    repeats=repeats,
                    with_sdpa=with_sdpa,
                    budget=budget,
                    case={
                        "shape": name,
                        "input": f"{kind} {text}" if kind is Input.CAPTURED else str(kind),
                        "length": tokens,
                        "heads": measured.heads,
                        "kv_heads": measured.kv_heads,
                        "head_dim": measured.head_dim,
                        "heads_of_model": model.heads,
                    },
                )
            )
            if not with_sdpa:
                console.print("  without SDPA: it needs a whole prompt, and minutes for a long one")
    if as_json != "-":
        Console(width=None if Console().is_terminal else 200).print(table(report))
    if as_json == "-":
        print(report.model_dump_json(indent=2))
    elif as_json:
        Path(as_json).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in draw(report, plots) if plots else []:
        console.print(f"wrote {path}")
    if strict and report.refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
