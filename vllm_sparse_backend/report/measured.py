"""A calibration's measurement: found beside its profile, and asked for densities.

`profile.json` has its measurement in `profile.measurement.json`. One of other policies would show
densities that this profile does not have: the digest of what was measured must be the profile's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_sparse_backend.calibrate.results import SCHEMA, Figures, Measurement, measurement_of
from vllm_sparse_backend.options import Refused, file_named
from vllm_sparse_backend.profile import Profile


@dataclass(frozen=True)
class Found:
    """A profile's measurement, or why there is none."""

    path: Path
    measurement: Measurement | None
    why_not: str = ""


def find(profile: Profile, path: Path) -> Found:
    """The measurement beside the profile in `path`. Raises Refused for one that cannot be read."""
    where = measurement_of(path)
    if not where.exists():
        return Found(where, None, f"no measurement beside the profile ({where.name})")
    measurement = load_measurement(where)
    if measurement.digest != profile.digest:
        return Found(where, None, f"{where.name} is of other policies than this profile's")
    return Found(where, measurement)


def load_measurement(path: Path) -> Measurement:
    """The measurement in a file. Raises Refused saying what is wrong with which file."""
    with file_named(f"measurement {path}"):
        measurement = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
    if measurement.measurement_schema != SCHEMA:
        raise Refused(
            f"measurement {path}: want measurement_schema {SCHEMA}, "
            f"got {measurement.measurement_schema}"
        )
    return measurement


def densities(measurement: Measurement, length: int) -> dict[tuple[int, int], float]:
    """The density of each measured (layer, head) for a prompt of so many tokens.

    Interpolated in the logarithm of the length, and beyond the measured lengths that of the
    nearest.
    """
    return {
        (head.layer, head.head): density_at(head.figures, length)
        for head in measurement.heads
        if head.figures
    }


def density_at(figures: dict[int, Figures], length: int) -> float:
    """One head's, likewise."""
    lengths = sorted(figures)
    known = [figures[tokens].density for tokens in lengths]
    return float(np.interp(np.log(length), np.log(lengths), known))
