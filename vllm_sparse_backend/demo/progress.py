"""Where the demo says what it is doing: stderr, so that stdout holds results only."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True, highlight=False)


def note(text: str, shown: bool = True) -> None:
    """One line of progress; nothing when `shown` is false."""
    if shown:
        console.print(text, markup=False, soft_wrap=True)
