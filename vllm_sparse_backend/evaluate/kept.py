"""Dense readings of an earlier evaluation in the same folder: no profile changes them.

A document counts as read only under the same model, engine options and tokens, which a key says;
one with questions, whose first token is timed, on the same machine with as many threads as well.
What the sparse side reads is never kept: it changes with every profile and every kernel.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_sparse_backend.demo.machine import this_machine
from vllm_sparse_backend.evaluate.readings import Reading
from vllm_sparse_backend.files import write_whole
from vllm_sparse_backend.offline import EngineOptions
from vllm_sparse_backend.tasks.items import Item


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    reading: Reading


class DenseReadings:
    """One file in ``folder`` for each document that ``options``' engine has read."""

    def __init__(self, folder: Path, options: EngineOptions) -> None:
        self._folder, self._options = folder, options
        # Without a GPU as it was before there was a field for one: what was kept then counts.
        self._machine = this_machine().model_dump(mode="json", exclude_none=True)

    def load(self, name: str, item: Item) -> Reading | None:
        """What was read of `item`, if it was."""
        try:
            kept = _Kept.model_validate_json(self._path(name).read_bytes())
        except (OSError, ValidationError):  # not there, cut off, or something else of that name
            return None
        return kept.reading if kept.key == self._key(item) else None

    def save(self, name: str, item: Item, reading: Reading) -> None:
        """Keep it, whole or not at all. Raises SparsePrefillError."""
        text = _Kept(key=self._key(item), reading=reading).model_dump_json()
        stays = (
            f"; what dense attention read before stays in {self._folder}, and the same command "
            "goes on from there"
        )
        write_whole(self._path(name), text, stays)

    def _key(self, item: Item) -> str:
        asked = [question.token_ids for question in item.questions]
        decides = [self._options.identity(), item.token_ids, asked, item.scored]
        if item.scored is None:  # its time to the first token is of these, too
            import torch

            decides += [self._machine, torch.get_num_threads()]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
