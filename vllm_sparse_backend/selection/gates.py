"""SeerAttention's gates: what is learned of a model, the file it is kept in, how it scores blocks.

A gate is two matrices. One maps the mean query of 64 positions, the other the largest, the smallest
and the mean key of 64 positions, each channel by itself, to vectors that RoPE turns by the block's
first position; their product says how much the queries look at the keys. All of it is done on
queries and keys before RoPE, which after it are turned back.

A file is safetensors: ``layers.N.q`` [heads, D, D], ``layers.N.k`` [heads, 3 D, D] and
``layers.N.frequencies`` [R / 2], in radians a token, of each layer N that has gates, and in its
metadata, as JSON under one name, what it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.selection.policy import Q_BLOCK

BLOCK = Q_BLOCK  # positions
FORMAT, VERSION = "vllm-sparse-gates", 1
SLICE = 64 * BLOCK  # positions that are turned back at a time


@dataclass(frozen=True, eq=False)
class Rotation:
    """A layer's RoPE: which angle a channel pair is turned by from one position to the next.

    Without frequencies nothing is turned.
    """

    frequencies: torch.Tensor  # fp32 [R / 2]
    interleaved: bool = False  # pairs are channels 2i and 2i + 1, not i and i + R / 2

    def turned(self, x: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
        """[..., n, D] at ``positions`` [n]."""
        pairs = len(self.frequencies)
        if not pairs:
            return x
        angle = positions[:, None].float() * self.frequencies
        cos, sin = angle.cos(), -angle.sin() if back else angle.sin()
        own = x[..., : 2 * pairs]
        one, two = (own[..., ::2], own[..., 1::2]) if self.interleaved else own.split(pairs, -1)
        ends = one * cos - two * sin, two * cos + one * sin
        mixed = torch.stack(ends, -1).flatten(-2) if self.interleaved else torch.cat(ends, -1)
        return torch.cat((mixed, x[..., 2 * pairs :]), -1)


@dataclass(frozen=True, eq=False)
class Gates:
    """Of one layer's heads."""

    q: torch.Tensor  # [H, D, D]
    k: torch.Tensor  # [H, 3 D, D]
    rotation: Rotation

    def logits(
        self, queries: torch.Tensor, keys: torch.Tensor, first_block: int = 0
    ) -> torch.Tensor:
        """Scores of pooled queries [H, m, D] with pooled keys [H or 1, n, 3 D]: fp32 [H, m, n],
        -inf where the block of keys is a later one. The first queries' block is given."""
        at = torch.arange(first_block, first_block + queries.shape[1], device=queries.device)
        of = torch.arange(keys.shape[1], device=keys.device)
        q = self.rotation.turned(queries @ self.q.float(), at * BLOCK)
        k = self.rotation.turned(keys @ self.k.float(), of * BLOCK)
        scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
        return scores.masked_fill(of > at[:, None], -torch.inf)


def pooled_queries(q: torch.Tensor, first: int, rotation: Rotation) -> torch.Tensor:
    """The mean of each block's present queries before RoPE, fp32 [G, blocks, D].

    ``q`` [G, T, D], of which the first row is at position ``first``.
    """
    parts, end = [], first + q.shape[1]
    for begin in range(first // SLICE * SLICE, end, SLICE):
        low, high = max(begin, first), min(begin + SLICE, end)
        at = torch.arange(low, high, device=q.device)
        rows = rotation.turned(q[:, at - first].float(), at, back=True)
        around = low % BLOCK, -high % BLOCK
        sums = pad(rows, (0, 0, *around)).unflatten(1, (-1, BLOCK)).sum(2)
        ones = torch.ones(len(at), 1, device=q.device)
        counts = pad(ones, (0, 0, *around)).unflatten(0, (-1, BLOCK)).sum(1)
        parts.append(sums / counts)
    return torch.cat(parts, 1)


def pooled_keys(k: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Each block's largest, smallest and mean key before RoPE, fp32 [blocks, 3 D].

    ``k`` [S, D] from position 0 on; the last block may be there in part.
    """
    parts = []
    for begin in range(0, len(k), SLICE):
        at = torch.arange(begin, min(begin + SLICE, len(k)), device=k.device)
        keys = rotation.turned(k[at].float(), at, back=True)
        missing = -len(at) % BLOCK
        blocks = torch.cat((keys, keys[-1:].expand(missing, -1))).unflatten(0, (-1, BLOCK))
        sums = pad(keys, (0, 0, 0, missing)).unflatten(0, (-1, BLOCK)).sum(1)
        counts = torch.full((len(sums), 1), float(BLOCK), device=k.device)
        counts[-1] -= missing
        parts.append(torch.cat((blocks.amax(1), blocks.amin(1), sums / counts), 1))
    return torch.cat(parts)


def save(path: Path, layers: Mapping[int, Gates], about: Mapping[str, str]) -> str:
    """Write gates, whole or not at all; the file's digest. The same gates give the same file.

    ``about``: what else is to be said in it. Raises OSError.
    """
    from safetensors.torch import save as serialized

    tensors = {}
    for number, its in layers.items():
        # Copies: layers may share what they have, which the format does not know.
        tensors[f"layers.{number}.q"] = its.q.to(torch.half, copy=True).contiguous()
        tensors[f"layers.{number}.k"] = its.k.to(torch.half, copy=True).contiguous()
        tensors[f"layers.{number}.frequencies"] = its.rotation.frequencies.float().clone()
    interleaved = {its.rotation.interleaved for its in layers.values()}
    if len(interleaved) != 1:
        raise ValueError("want layers that all pair channels alike, got both kinds or none")
    said = {**about, "version": VERSION, "interleaved": interleaved.pop()}
    # Under one name: several would be written in any order.
    content = serialized(tensors, {FORMAT: json.dumps(said, sort_keys=True)})
    scratch = path.with_name(path.name + ".new")
    scratch.write_bytes(content)
    os.replace(scratch, path)
    return _digest(content)


@cache
def load(path: str, layer: int, digest: str = "", device: str = "cpu") -> Gates:
    """The gates of one layer, on ``device``, once for all who ask.

    ``digest``: what the file must have, unless empty. Raises SelectorError if there is no such
    file, if it is another one or none of gates, or has no gates of that layer.
    """
    from safetensors import SafetensorError, safe_open

    _expect_digest(path, digest)
    names = [f"layers.{layer}.{name}" for name in ("q", "k", "frequencies")]
    try:
        with safe_open(path, "pt") as file:
            about, known = _about(path, file.metadata() or {}), set(file.keys())
            if not known.issuperset(names):
                layers = sorted({int(name.split(".")[1]) for name in known})
                raise SelectorError(f"gates {path}: want those of layer {layer}, got of {layers}")
            q, k, frequencies = (file.get_tensor(name).to(device) for name in names)
    except OSError as error:
        raise SelectorError(f"gates {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise SelectorError(f"gates {path}: want a safetensors file ({error})") from None
    return Gates(q.float(), k.float(), Rotation(frequencies, bool(about["interleaved"])))


def _about(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of itself."""
    if FORMAT not in metadata:
        raise SelectorError(f"gates {path}: want {FORMAT} in its metadata, got {sorted(metadata)}")
    about: dict[str, Any] = json.loads(metadata[FORMAT])
    if about.get("version") != VERSION:
        raise SelectorError(f"gates {path}: want version {VERSION}, got {about.get('version')}")
    return about


@cache
def _expect_digest(path: str, digest: str) -> None:
    if not digest:
        return
    try:
        own = _digest(Path(path).read_bytes())
    except OSError as error:
        raise SelectorError(f"gates {path}: {error.strerror}") from None
    if own != digest:
        raise SelectorError(f"gates {path}: want the digest {digest}, got {own}")


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
