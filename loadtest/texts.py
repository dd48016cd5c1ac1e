"""Kinds of text that this machine has no files of, for `vllm-sparse eval --text`.

    python loadtest/texts.py -o texts/
    vllm-sparse eval --text texts/tables.txt --tasks text

`tables`: CSV with a header, of orders whose customers, items and prices come back; `pairs`: keys
with random values, every key said several times and always with its own, so that a value can be
known from far back and from nowhere else; `prose`: Python's help topics, as running text. Seeded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vllm_sparse_backend.tasks.source import CODE, read_sources

LINES = 12_000  # some 250,000 tokens
KEYS = 150  # of a section of pairs
SECTION = 600  # lines


def tables(rng: random.Random) -> str:
    """Rows of orders."""
    customers = [f"C{rng.randrange(10_000):04}" for _ in range(80)]
    items = [(f"{rng.choice('ABCD')}-{n:03}", rng.randrange(100, 9000) / 100) for n in range(60)]
    rows = ["order,date,customer,item,quantity,price,total"]
    for number in range(LINES):
        item, price = rng.choice(items)
        count = rng.randrange(1, 12)
        date = f"2024-{number * 12 // LINES + 1:02}-{rng.randrange(1, 29):02}"
        customer = rng.choice(customers)
        total = f"{count * price:.2f}"
        rows.append(f"{100_000 + number},{date},{customer},{item},{count},{price:.2f},{total}")
    return "\n".join(rows) + "\n"


def pairs(rng: random.Random) -> str:
    """Lines of a key and its value, in sections of their own keys."""
    lines = []
    for _ in range(LINES // SECTION):
        values = {f"{rng.getrandbits(24):06x}": rng.randrange(1000) for _ in range(KEYS)}
        chosen = rng.choices(list(values), k=SECTION)
        lines += [f"{key} = {values[key]:03}" for key in chosen]
    return "\n".join(lines) + "\n"


def prose(_: random.Random) -> str:
    """Help topics."""
    return "".join(
        text for source in read_sources() if source.name != CODE for text in source.texts
    )


KINDS: dict[str, Callable[[random.Random], str]] = {
    "tables": tables, "pairs": pairs, "prose": prose
}  # fmt: skip


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")] = Path("texts"),
    seed: Annotated[int, typer.Option(help="Another gives other texts.")] = 0,
) -> None:
    """Write one file of each kind."""
    output.mkdir(parents=True, exist_ok=True)
    for name, make in KINDS.items():
        text = make(random.Random(f"{name} {seed}"))
        (output / f"{name}.txt").write_text(text, encoding="utf-8")
        typer.echo(f"{output / name}.txt: {len(text):,} characters", err=True)


if __name__ == "__main__":
    typer.run(main)
