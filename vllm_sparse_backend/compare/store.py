"""What a comparison has done so far, in a folder: what it read of the model, and each measured
setting in a file of its own.

So one that was interrupted goes on where it was, and one with more methods, lengths or layers
measures only those. A file counts only if it was made of the same model, text and code under the
same options, which a key in it says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_sparse_backend.compare.layer import Layer
from vllm_sparse_backend.errors import SparsePrefillError

CAPTURED, POINTS, PERPLEXITY = "captured", "points", "perplexity"

Record = TypeVar("Record", bound=BaseModel)


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    record: dict[str, Any]


class _Read(BaseModel):
    """Of one layer of one prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    starts: list[int]  # of its chunks
    scale: float


class Store:
    """The folder of one comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, kind: str, name: str, key: str, of: type[Record]) -> Record | None:
        """A record, if it is there under this key."""
        try:
            kept = _Kept.model_validate_json(self._path(kind, name).read_bytes())
            return of.model_validate(kept.record) if kept.key == key else None
        except (OSError, ValidationError):  # not there, cut off, or something else of that name
            return None

    def save(self, kind: str, name: str, key: str, record: BaseModel) -> None:
        """Write a record, whole or not at all. Raises SparsePrefillError."""
        text = _Kept(key=key, record=record.model_dump(mode="json")).model_dump_json()
        self._write(self._path(kind, name), lambda path: path.write_text(text, encoding="utf-8"))

    def has_layer(self, name: str, key: str) -> bool:
        """Whether a layer of a prompt was read under this key, to its end."""
        return self.load(CAPTURED, name, key, _Read) is not None

    def save_chunk(self, name: str, start: int, layer: Layer) -> None:
        """The rows of one chunk and their own keys and values. Raises SparsePrefillError."""
        from safetensors.torch import save_file

        tensors = {"q": layer.q, "k": layer.k, "v": layer.v}
        tensors = {each: x.contiguous() for each, x in tensors.items()}

        def write(path: Path) -> None:
            # Of what was read before no chunk may count once one of them is another's.
            self._path(CAPTURED, name).unlink(missing_ok=True)
            save_file(tensors, path)

        self._write(self._chunk(name, start), write)

    def close_layer(self, name: str, key: str, starts: list[int], scale: float) -> None:
        """All chunks are there."""
        self.save(CAPTURED, name, key, _Read(starts=starts, scale=scale))

    def layer(self, name: str, key: str) -> tuple[Layer, list[int]]:
        """A layer that was read, and where its chunks end. Raises SparsePrefillError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        read = self.load(CAPTURED, name, key, _Read)
        assert read is not None
        paths = [self._chunk(name, start) for start in read.starts]
        try:
            chunks = [load_file(path) for path in paths]
        except (OSError, SafetensorError) as error:
            raise SparsePrefillError(
                f"{self.folder / CAPTURED}: cannot be read ({error}); delete it, and the same "
                "command makes it anew"
            ) from error
        q, k, v = (torch.cat([chunk[each] for chunk in chunks]) for each in "qkv")
        return Layer(q, k, v, scale=read.scale), [*read.starts[1:], len(q)]

    def _chunk(self, name: str, start: int) -> Path:
        return self.folder / CAPTURED / f"{name}-{start}.safetensors"

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.json"

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        scratch = path.with_suffix(".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch)
            os.replace(scratch, path)
        except Exception as error:  # safetensors has an error of its own for a full disk
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise SparsePrefillError(
                f"{path}: cannot be written ({error}); what is finished stays in {self.folder}, "
                "and the same command goes on from there"
            ) from error
