"""Put what evaluations found into a profile's figures, for one that ships with the package.

    python tools/ship_profile.py profile.json --name SmolLM2-135M-Instruct \\
        --eval eval-report/eval.json --quality quality.json --as "g0.04 008d9d" -o shipped.json

`--quality` is the JSON of loadtest/quality.py, `--as` the profile's name in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from vllm_sparse_backend.evaluate.results import Row, load_evaluation
from vllm_sparse_backend.profile import load_profile


def _of_evaluations(paths: Sequence[Path], digest: str) -> dict[str, float]:
    """Questions of several seeds add up."""
    counts: Counter[str] = Counter()
    figures: dict[str, float] = {}
    for row in chain.from_iterable(_rows(path, digest) for path in paths):
        name = f"eval_{row.task}_{row.length}"
        if row.retrieval:
            counts[f"{name}_asked"] += row.retrieval.asked
            counts[f"{name}_dense_right"] += row.retrieval.dense_right
            counts[f"{name}_kept"] += row.retrieval.both
            counts[f"{name}_gained"] += row.retrieval.gained
        if row.likelihood:
            name = f"{name}_{row.text}"
            figures[f"{name}_perplexity_percent"] = round(row.likelihood.change_percent, 2)
        if row.density is not None:
            figures[f"{name}_density"] = round(row.density, 3)
    return figures | counts


def _rows(path: Path, digest: str) -> tuple[Row, ...]:
    evaluation = load_evaluation(path)
    if evaluation.profile_digest != digest:
        raise typer.BadParameter(f"{path}: of profile {evaluation.profile_digest}, want {digest}")
    return evaluation.rows


def _of_quality(path: Path, name: str) -> dict[str, float]:
    figures = {}
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        if case["policy"] == name:
            prefix = f"eval_{case['task']}_{case['length']}"
            figures[f"{prefix}_perplexity_percent"] = round(case["change_percent"], 2)
            figures[f"{prefix}_density"] = round(case["density"], 3)
    if not figures:
        raise typer.BadParameter(f"{path}: nothing of {name!r}")
    return figures


def main(
    profile: Annotated[Path, typer.Argument(help="As calibrated.")],
    output: Annotated[Path, typer.Option("--output", "-o")],
    name: Annotated[str, typer.Option(help="The profile's name.")],
    evaluation: Annotated[list[Path] | None, typer.Option("--eval", help="Repeat.")] = None,
    quality: Annotated[Path | None, typer.Option(help="JSON of loadtest/quality.py.")] = None,
    known_as: Annotated[str, typer.Option("--as", help="Its name there.")] = "",
) -> None:
    """Write the profile to ship."""
    made = load_profile(profile)
    if made.calibration is None:
        raise typer.BadParameter(f"{profile}: not calibrated")
    figures = dict(made.calibration.figures)
    figures |= _of_evaluations(evaluation or [], made.digest)
    if quality is not None:
        figures |= _of_quality(quality, known_as)
    calibration = made.calibration.model_copy(update={"figures": figures})
    made.model_copy(update={"name": name, "calibration": calibration}).save(output)


if __name__ == "__main__":
    typer.run(main)
