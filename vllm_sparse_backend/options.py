"""What the commands of `vllm-sparse` share: options, exit statuses, and how they refuse."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import typer

from vllm_sparse_backend.errors import SparsePrefillError

EXIT_LOSS = 1  # it ran, and sparse lost something
EXIT_FAILED = 2  # it did not run
ALL = "all"  # of names, each that there is
EXIT_INTERRUPTED = 130  # as a shell counts Ctrl-C
# Modules by the extra that brings them, and those that come with vLLM, of which there are several
# builds: what is installed of it must not be replaced by another for want of something else.
EXTRAS = {
    "demo": ("accelerate", "gguf", "jinja2", "markupsafe", "matplotlib", "openai", "rich"),
    "loadtest": ("pandas", "yaml"),
}
OF_VLLM = ("vllm", "torch", "transformers", "numpy", "safetensors", "tqdm")

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
Target = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Whose costs decide: a CPU's (avx512_bf16, avx512_vnni, avx512, avx2), which were "
        "measured, or a GPU's (sm_80, sm_89, sm_90, sm_100), which are PREDICTED from compiled "
        "kernels and were never timed on hardware. Default: this machine's GPU, or else its CPU.",
        show_default=False,
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


def check_output(path: Path, option: str = "--output") -> None:
    """Raise Refused for a file that could not be written in the end, before work is done for it."""
    if path.is_dir():
        raise Refused(f"{option}: want a file, got {path}, a folder")
    if path.exists() and not path.is_file():  # a device would be replaced
        raise Refused(f"{option}: want a regular file, got {path}, which is something else")
    folder = next(its for its in path.absolute().parents if its.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refused(
            f"{option} {path}: want a folder to write in, got {folder} ({error.strerror})"
        ) from None


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
        if isinstance(error, ModuleNotFoundError) and (advice := _install(error.name)):
            fail(f"{error}; want it installed: {advice}")
        traceback.print_exc()
        fail("this should not have happened; the traceback above says where")


def _install(module: str | None) -> str | None:
    """How to get a module that is missing; None: of one that nothing needs."""
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"pip install 'vllm-sparse-backend[{extra}]'"
    if module not in OF_VLLM:
        return None
    if module != "vllm" and find_spec("vllm") is not None:
        return f"pip install {module}"
    return (
        "pip install 'vllm-sparse-backend[cpu]', or 'vllm-sparse-backend[cuda]' for GPUs of NVIDIA"
    )


def fail(message: str) -> NoReturn:
    """End with the message and `EXIT_FAILED`."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_FAILED)
