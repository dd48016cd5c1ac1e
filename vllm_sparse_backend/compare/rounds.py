"""Which measurements something else on the machine spoiled, as dense attention's time beside them
says.

A setting's time is taken over that of dense attention in the same round, which is right where a
round was slow as a whole, and wrong where the machine stood still for a while that one of the two
had to pay for. Then dense attention's time is far from what it is in other rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from vllm_sparse_backend.compare.measure import Measured

SHARE = 0.3  # of the usual time
SECONDS = 0.05  # less is what short runs differ by, whatever their share


def usual(measured: Mapping[str, Measured]) -> float:
    """Dense attention's seconds in one layer at one length: the median over rounds of theirs."""
    return median(median(dense) for dense in {tuple(its.dense) for its in measured.values()})


def spoiled(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Of one layer at one length, by name: those in whose rounds dense attention's time was off,
    and what it was over the usual."""
    if not measured:
        return {}
    seconds = usual(measured)
    allowed = max(SHARE * seconds, SECONDS)
    off = {name: median(its.dense) for name, its in measured.items()}
    return {name: its / seconds for name, its in off.items() if abs(its - seconds) > allowed}
