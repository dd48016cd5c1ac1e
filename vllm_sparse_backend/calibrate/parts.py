"""What is finished of a calibration, in a folder: a document's sums in a file each.

So a calibration that was interrupted goes on where it was, and another budget or rule needs nothing
to be read again. A file counts only if it was made from the same document under the same settings,
which a key in it says.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparse_backend.calibrate.measure import BY_LADDER
from vllm_sparse_backend.calibrate.table import Floats, Group, Part
from vllm_sparse_backend.errors import SparsePrefillError

SENSITIVITY = "sensitivity"  # no document's name
SINGLE = ("size", "rows", "causal")


class PartsFolder:
    """The finished documents of one calibration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str, key: str, group: Group) -> Part | None:
        """A document's part, if it has been finished under this key."""
        tensors = self._read(name, key)
        if tensors is None:
            return None
        ladders = range(sum(each.startswith("error.") for each in tensors))
        fields: dict[str, Any] = {each: tensors[each] for each in SINGLE}
        fields |= {each: [tensors[f"{each}.{n}"] for n in ladders] for each in BY_LADDER}
        if "keep_all" in tensors:
            listed = range(sum(each.startswith("select.") for each in tensors))
            fields["select"] = [tensors[f"select.{n}"] for n in listed]
            fields |= {"keep_all": tensors["keep_all"], "steps": int(tensors["steps"].item())}
        return Part(group=group, octaves=tensors["octaves"].tolist(), **fields)

    def save(self, name: str, key: str, part: Part) -> None:
        """Write a finished document's, whole or not at all. Raises SparsePrefillError."""
        tensors: dict[str, Any] = {"octaves": np.array(part.octaves, dtype=np.int64)}
        tensors |= {each: getattr(part, each) for each in SINGLE}
        for each in BY_LADDER:
            tensors |= {f"{each}.{n}": x for n, x in enumerate(getattr(part, each))}
        if part.select and part.keep_all is not None:
            tensors |= {f"select.{n}": x for n, x in enumerate(part.select)}
            tensors |= {"keep_all": part.keep_all, "steps": np.array(part.steps)}
        self._write(name, key, tensors)

    def load_sensitivity(self, key: str) -> Floats | None:
        """[L, H], if it has been measured under this key."""
        tensors = self._read(SENSITIVITY, key)
        return None if tensors is None else tensors[SENSITIVITY]

    def save_sensitivity(self, key: str, sensitivity: Floats) -> None:
        """Like `save`."""
        self._write(SENSITIVITY, key, {SENSITIVITY: sensitivity})

    def _read(self, name: str, key: str) -> dict[str, Any] | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                return {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # cut off, or something else of that name
            return None

    def _write(self, name: str, key: str, tensors: dict[str, Any]) -> None:
        from safetensors.numpy import save_file

        path = self._path(name)
        scratch = path.with_suffix(".new")
        tensors = {each: np.ascontiguousarray(its) for each, its in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, scratch, metadata={"key": key})
            os.replace(scratch, path)
        except Exception as error:  # safetensors has an error of its own for a full disk
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise SparsePrefillError(
                f"{path}: cannot be written ({error}); the documents finished so far stay in "
                f"{self.folder}, and the same command goes on from there"
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
