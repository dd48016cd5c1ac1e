"""Others' profiles: read into one of ours, and ours written for them where they can say it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vllm_sparse_backend.errors import ProfileError, describe
from vllm_sparse_backend.profile import FORMAT, ModelFacts, Profile, no_duplicates, read_text

Source = Literal["minference", "modelopt"]
Unsupported = Literal["error", "dense"]


@dataclass(frozen=True)
class Imported:
    """A profile made of another's file, and what to say about it."""

    profile: Profile
    notes: tuple[str, ...]


def import_profile(
    path: Path,
    facts: ModelFacts,
    source: Source | None = None,
    unsupported: Unsupported = "error",
) -> Imported:
    """The profile in another project's file, for the model with these facts.

    ``source``: whose file it is; None: seen from its contents. ``unsupported``: what becomes of a
    part of Model Optimizer's that no selector here computes. Raises ProfileError.
    """
    from vllm_sparse_backend.exchange import minference, modelopt

    readers: dict[Source, Callable[[Any, ModelFacts, str], Imported]] = {
        "minference": minference.read,
        "modelopt": partial(modelopt.read, unsupported=unsupported),
    }
    data = read_json(path)
    try:
        chosen = source or _source_of(data)
        # A config.json is called after the checkpoint it lies in.
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        made = readers[chosen](data, facts, name)
        made.profile.match(facts)
    except ProfileError as error:
        raise type(error)(f"{path}: {error}") from None
    except ValidationError as error:  # a text that is quoted in the profile and is no Unicode
        raise ProfileError(f"{path}: {describe(error)}") from None
    return made


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ProfileError."""
    text = read_text(path, "file")
    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ProfileError(f"file {path}: not valid JSON: {error}") from None


def _source_of(data: Any) -> Source:
    if isinstance(data, list):
        return "minference"
    if isinstance(data, dict):
        if data.get("format") == FORMAT:
            raise ProfileError("this is a profile already; `vllm-sparse validate` checks it")
        if data.keys() & {"sparse_attention_config", "config_groups", "threshold_scale_factor"}:
            return "modelopt"
    raise ProfileError(
        "want MInference's list of layers, or a config.json with Model Optimizer's "
        "sparse_attention_config; found neither"
    )
