"""What the commands of `vllm-sparse` share: options, exit statuses, and how they refuse."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import typer

from vllm_sparse_backend.errors import SparsePrefillError

EXIT_LOSS = 1  # it ran, and sparse lost something
EXIT_FAILED = 2  # it did not run
ALL = "all"  # of names, each that there is
EXIT_INTERRUPTED = 130  # as a shell counts Ctrl-C
# Extras that bring a module, and what to install for it. What vLLM itself brings is of the first.
EXTRAS = {
    "cpu": ("vllm", "torch", "transformers", "numpy", "safetensors", "tqdm"),
    "cpu,demo": ("accelerate", "gguf", "jinja2", "markupsafe", "matplotlib", "openai", "rich"),
    "cpu,demo,loadtest": ("pandas", "yaml"),
}

Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        help="What the model computes in. auto: bfloat16, or float32 on a CPU without AVX-512, "
        "where bfloat16 matrix products are ten times slower than float32 ones."
    ),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=128,
        help="Tokens of a prompt in one step (vLLM's --max-num-batched-tokens). Default: 2048, or "
        "1024 where log probabilities over a vocabulary of more than 100,000 are asked for, which "
        "take much memory.",
    ),
]
HfOverrides = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="vLLM's --hf-overrides, for every length. With max_position_embeddings in it, lengths "
        "up to that.",
    ),
]


class Refused(SparsePrefillError):
    """A wrong option; the message names it."""


def parse_lengths(text: str, option: str = "--lengths") -> list[int]:
    """Token counts, ascending and unique, from "4096,16384". Raises Refused."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise Refused(f"{option}: want numbers with commas between them, got {text!r}")
    return numbers


class Names(NamedTuple):
    """What `parse_names` read."""

    taken: list[str]
    asked: set[str]  # of these, what was named by itself: it must not be missing


def parse_names(text: str, known: Sequence[str], option: str = "--methods") -> Names:
    """Some of the ``known`` names, in the order of "all,-hip" or "mass,strided": ``all`` is each of
    them, -NAME none of that name. Raises Refused for one that there is not."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part.removeprefix("-") not in known and part != ALL:
            raise Refused(f"{option}: want all or some of {', '.join(known)}, got {part!r}")
    without = {part.removeprefix("-") for part in parts if part.startswith("-")}
    wanted = [name for part in parts for name in (known if part == ALL else [part])]
    taken = [name for name in dict.fromkeys(wanted) if name in known and name not in without]
    if not taken:
        raise Refused(f"{option}: want all or some of {', '.join(known)}, got {text!r}")
    return Names(taken, {name for name in taken if name in parts})


def json_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The object in an option's text; None where it was not given. Raises Refused."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refused(f"{option}: want JSON, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise Refused(f"{option}: want a JSON object, got {text!r}")
    return value


@contextmanager
def file_named(file: str) -> Iterator[None]:
    """A file that cannot be read as what it should be is refused, `file` saying which it is."""
    from pydantic import ValidationError

    from vllm_sparse_backend.errors import describe

    try:
        yield
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}") from None
    except ValidationError as error:
        raise Refused(f"{file}: {describe(error)}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not UTF-8 text: {error.reason}") from None


@contextmanager
def errors_named(interrupted: str = "interrupted") -> Iterator[None]:
    """What a user can do something about becomes one message and an exit status."""
    try:
        yield
    except SparsePrefillError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:  # Python's own exit status, 1, would say that something is lost
        for extras, modules in EXTRAS.items():
            if isinstance(error, ModuleNotFoundError) and error.name in modules:
                fail(f"{error}; want it installed: pip install 'vllm-sparse-backend[{extras}]'")
        traceback.print_exc()
        fail("this should not have happened; the traceback above says where")


def fail(message: str) -> NoReturn:
    """End with the message and `EXIT_FAILED`."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_FAILED)
