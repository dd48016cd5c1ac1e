"""How much of the machine something else used while a server was measured.

Two sides that are measured minutes apart are comparable only if neither shared its cores.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


@dataclass(frozen=True)
class CpuTime:
    """A moment: seconds of CPU time the whole machine has used, and one session of it."""

    wall: float
    machine: float
    session: float

    def others_since(self, earlier: CpuTime) -> float:
        """Cores that others used on average between the two moments."""
        machine = self.machine - earlier.machine
        others = machine - (self.session - earlier.session)
        return max(0.0, others / (self.wall - earlier.wall))


def cpu_time(session: int) -> CpuTime:
    """Now. `session`: the id of the session whose processes are not "others"."""
    return CpuTime(time.perf_counter(), _machine(), _session(session))


def _machine() -> float:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, (PROC / "stat").read_text().split(maxsplit=9)[1:9]
    )
    # Stolen time, too: a neighbour of this virtual machine had the core.
    return (user + nice + system + irq + softirq + steal) / TICK


def _session(session: int) -> float:
    ticks = 0
    for process in PROC.iterdir():
        if process.name.isdigit():
            try:
                text = (process / "stat").read_text()
            except OSError:  # it has ended meanwhile
                continue
            # Behind the name, which may have spaces and parentheses in it: state, ppid, pgrp,
            # session, ..., and utime and stime in the 12th and 13th place.
            fields = text.rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK
