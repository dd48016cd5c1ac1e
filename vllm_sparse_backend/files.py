"""Files of results: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vllm_sparse_backend.errors import SparsePrefillError


def write_whole(path: Path, text: str, otherwise: str = "") -> None:
    """Write a file, in a folder that is made if it is not there.

    Raises SparsePrefillError, which names the file, says why, and ``otherwise``; nothing of it is
    left then, and what was there before stays.
    """
    scratch = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException as error:  # an interrupt, too, leaves nothing behind
        with contextlib.suppress(OSError):
            scratch.unlink()
        if not isinstance(error, OSError):
            raise
        raise SparsePrefillError(
            f"{path}: cannot be written ({error.strerror}){otherwise}"
        ) from error
