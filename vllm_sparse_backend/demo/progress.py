"""Where the demo says what it is doing: stderr, so that stdout holds results only."""

from __future__ import annotations

import os

from rich.console import Console

BUSY = 0.7  # processes that computed during the last minute

console = Console(stderr=True, highlight=False)


def note(text: str, shown: bool = True) -> None:
    """One line of progress; nothing when `shown` is false."""
    if shown:
        console.print(text, markup=False, soft_wrap=True)


def warn_if_busy() -> None:
    """Figures taken beside something else that computes are worth little; say so."""
    load = os.getloadavg()[0]
    if load > BUSY:
        note(f"warning: this machine is busy (load {load:.1f}): the times will be off")
