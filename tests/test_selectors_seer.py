"""SeerAttention's gates against a transcription of what they compute, and their file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _rules import (
    SHAPES,
    Array,
    Case,
    Tiles,
    case,
    contains,
    found,
    in_chunks,
    owed,
    poisoned,
    softmax,
    step,
)

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.ops import PolicyTable, sparse_attention
from vllm_sparse_backend.ops.listed import rehearse
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.selection import gates, parse_policy
from vllm_sparse_backend.selection.gates import Gates, Rotation
from vllm_sparse_backend.selection.seer import Seer

WINDOW: dict[str, Any] = {"sink": 1, "local": 0}
HEADS, DIM = 2, 64


def made(seed: int = 0, pairs: int = 32, interleaved: bool = False, heads: int = HEADS) -> Gates:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, DIM, DIM, generator=g) / 8 + torch.eye(DIM)
    k = torch.randn(heads, 3 * DIM, DIM, generator=g) / 8
    frequencies = 1000.0 ** -(torch.arange(pairs) / max(1, pairs))
    return Gates(q, k, Rotation(frequencies, interleaved))


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Write gates of the layer 0, and maybe of others, and give the path."""
    numbers = itertools.count()

    def written(*layers: Gates) -> str:
        path = tmp_path / f"gates-{next(numbers)}.safetensors"
        gates.save(path, dict(enumerate(layers)), {})
        return str(path)

    return written


def rotated(x: Array, position: float, its: Rotation) -> Array:
    """RoPE of one vector, pair by pair; back by a negative position."""
    out, pairs = x.copy(), len(its.frequencies)
    for i, frequency in enumerate(its.frequencies.double().tolist()):
        a, b = (2 * i, 2 * i + 1) if its.interleaved else (i, i + pairs)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def rule(policy: Seer, it: Case, of: Gates, head: int) -> Tiles:
    """Before RoPE: mean query, largest, smallest and mean key of 64; linear; RoPE of the block's
    first position; softmax; threshold."""
    to_q, to_k = of.q[head].half().double().numpy(), of.k[head].half().double().numpy()
    keys = []
    for begin in range(0, it.seq_len, 64):
        end = min(begin + 64, it.seq_len)
        plain = np.array([rotated(it.k[p], -p, of.rotation) for p in range(begin, end)])
        three = np.concatenate((plain.max(0), plain.min(0), plain.mean(0)))
        keys.append(rotated(three @ to_k, begin, of.rotation))
    wanted = []
    for number, first, end in it.q_blocks():
        plain = np.array([rotated(it.row(p), -p, of.rotation) for p in range(first, end)])
        query = rotated(plain.mean(0) @ to_q, 64 * number, of.rotation)
        scores = np.array([query @ key for key in keys[: number + 1]]) / math.sqrt(DIM)
        kept = (softmax(scores) > policy.threshold).nonzero()[0]
        wanted.append([p for j in kept for p in range(64 * j, 64 * j + 64)])
    return owed(policy, it, wanted)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(("pairs", "interleaved"), [(32, False), (16, True), (0, False)])
@pytest.mark.parametrize(("threshold", "tile"), [(0.02, 16), (0.1, 64)])
def test_the_tiles_are_the_rules(
    file: Callable[..., str],
    size: tuple[int, int],
    pairs: int,
    interleaved: bool,
    threshold: float,
    tile: Any,
) -> None:
    its = made(sum(size), pairs, interleaved)
    for more in (WINDOW, {"sink": 70, "local": 100, "growth": 0.1}):
        policy = Seer(gates=file(its), threshold=threshold, tile=tile, **more)
        qkv = step(sum(size), *size)
        for head, tiles in enumerate(found(policy, qkv)):
            assert tiles == rule(policy, case(qkv, head), its, head)


@pytest.mark.parametrize("size", [64, 192, 256])
def test_chunks_of_a_prompt_keep_what_the_whole_one_does(
    file: Callable[..., str], size: int
) -> None:
    qkv, policy = step(5, 1500, 1500), Seer(gates=file(made()), threshold=0.03, **WINDOW)
    assert in_chunks(policy, qkv, size) == found(policy, qkv)


def test_long_contexts_are_pooled_in_parts(
    file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, policy = step(6, 900, 1100), Seer(gates=file(made()), threshold=0.03, **WINDOW)
    whole = found(policy, qkv)
    monkeypatch.setattr(gates, "SLICE", 256)
    assert found(policy, qkv) == whole


def test_a_higher_threshold_keeps_less(file: Callable[..., str]) -> None:
    qkv, path = step(7, 500, 1472), file(made())
    shares = (0.0, 0.01, 0.03, 0.1, 0.5, 1.0)
    every = [found(Seer(gates=path, threshold=share, **WINDOW), qkv) for share in shares]
    for more, less in itertools.pairwise(every):
        assert contains(more[0], less[0]) and contains(more[1], less[1])
    whole = [-(-end // 16) for _, _, end in case(qkv, 0).q_blocks()]
    assert [len(tiles) for tiles in every[0][0]] == whole
    assert [len(tiles) for tiles in every[-1][0]] < whole


def test_what_cannot_be_judged_is_kept(file: Callable[..., str]) -> None:
    policy, qkv = Seer(gates=file(made()), threshold=0.1, **WINDOW), step(4, 320, 1344)
    for head in found(policy, poisoned(qkv, key=500)):
        assert all(500 // 16 in tiles for tiles in head)
    for head in found(policy, poisoned(qkv, row=1343)):
        assert len(head[-1]) == 84


def test_heads_have_gates_of_their_own(file: Callable[..., str]) -> None:
    """Numbers are the whole layer's: a rank that has the last heads takes their gates."""
    path, (q, k, v) = file(made(heads=8)), step(3, 300, 1200, heads=1)
    policy = Seer(gates=path, threshold=0.05, **WINDOW)
    kept = []
    for first in (0, 7):
        table = PolicyTable([policy], place=Place(0, first, 8))
        kept.append(sparse_attention(q, k, v, table, impl="reference")[1].tiles_computed)
    assert kept[0] != kept[1]


# The file


def test_gates_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    digest = gates.save(path, {3: made(1), 7: made(2)}, {"architecture": "X"})
    assert digest == gates.save(path, {3: made(1), 7: made(2)}, {"architecture": "X"})
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]
    loaded = gates.load(str(path), 7, digest)
    assert loaded is gates.load(str(path), 7, digest), "once for all"
    assert torch.equal(loaded.q, made(2).q.half().float())
    assert torch.equal(loaded.k, made(2).k.half().float())
    assert torch.equal(loaded.rotation.frequencies, made(2).rotation.frequencies)


def at_start(path: str, layer: int = 0, heads: int = HEADS, **more: Any) -> None:
    """What a server does with a layer's policies when it starts."""
    policy = Seer(gates=path, **more)
    rehearse(PolicyTable([policy] * heads, place=Place(layer, 0, heads)), DIM)


def test_a_start_stops_without_the_right_gates(file: Callable[..., str], tmp_path: Path) -> None:
    path = file(made(), made())
    at_start(path)
    at_start(path, layer=1)
    missing = str(tmp_path / "none.safetensors")
    for wrong, said in (
        (lambda: at_start(missing), "none.safetensors: No such file"),
        (lambda: at_start(path, layer=2), r"want those of layer 2, got of \[0, 1\]"),
        (lambda: at_start(path, heads=4), "want those of 4 heads of 64 in layer 0, got of 2 heads"),
        (lambda: at_start(path, digest="sha256:" + "0" * 64), "want the digest sha256:000"),
    ):
        for _ in range(2):
            with pytest.raises(SelectorError, match=said):
                wrong()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no such thing")
    with pytest.raises(SelectorError, match="want a safetensors file"):
        at_start(str(other))
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(SelectorError, match=r"want vllm-sparse-gates in its metadata, got \[\]"):
        at_start(str(other))
    q, k, v = step(0, 100, 300)
    with pytest.raises(SelectorError, match="want a layer of a model"):
        sparse_attention(q, k, v, Seer(gates=path))


def test_it_is_a_policy() -> None:
    assert parse_policy({"selector": "seer"}) == Seer(threshold=0.002, gates="gates.safetensors")
    assert Seer(threshold=0.01).scaled(3) == Seer(threshold=0.03)
    assert Seer() in Seer.ladder()
    for wrong in ({"threshold": 1.5}, {"gates": ""}, {"digest": "abc"}):
        with pytest.raises(ValueError, match="seer"):
            parse_policy({"selector": "seer", **wrong})
