"""List selectors where the tensors are not the host's: the same tiles, nothing mixed, and what is
waited for is what the page says."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _attention import make_paged, make_qkv
from _elsewhere import ELSEWHERE, Away, elsewhere
from _rules import step, view_of
from _selectors import Nothing, Peak

from vllm_sparse_backend.errors import SelectorError
from vllm_sparse_backend.fit_gates.fit import untaught
from vllm_sparse_backend.ops import PolicyTable
from vllm_sparse_backend.ops.listed import rehearse
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.ops.triton import plan_work
from vllm_sparse_backend.ops.triton.listed import choose_of_zeros, set_bits
from vllm_sparse_backend.selection import DENSE, AnyPolicy, ListSelector, gates, registry
from vllm_sparse_backend.selection import parse_policy as parse
from vllm_sparse_backend.selection.gates import Rotation
from vllm_sparse_backend.selection.kept import kept_tiles
from vllm_sparse_backend.selection.s2 import Strided
from vllm_sparse_backend.selection.vertical_slash import VerticalSlash
from vllm_sparse_backend.selection.view import View

RAW = (Path(__file__).parents[1] / "docs" / "selectors.md").read_text()
PAGE = " ".join(RAW.split())
WINDOW: dict[str, Any] = {"sink": 16, "local": 0, "growth": 0.01}
# What leaves something out of a short context.
FEW: dict[str, list[dict[str, Any]]] = {
    "anchor": [{"theta": 2.0, "superblock": 1}],
    "block_topk": [{"blocks": 5}],
    "flashprefill": [{"alpha": 0.5, "last": 0}],
    "flexprefill": [{"gamma": 0.6, "min_budget": 128}, {"gamma": 0.6, "distance": 0.0}],
    "hip": [{"k": 128, "k_second": 256, "k_first": 512, "dense_layers": 0}],
    "hyper": [{"exact": 128, "block": 64, "samples": 64}],
    "longheads": [{"chunk": 64, "budget": 256}],
    "neighborhood": [{"window": 300, "stride": 100}],
    "seer": [{"threshold": 0.08}],
    "skip_softmax": [{"threshold": 0.5}],
    "sparge": [{"tau": 0.5, "alike": -1.0}, {"tau": 0.5, "smooth_k": True}],
    "strided": [{"stride": 4}],
    "vertical_slash": [{"columns": 60, "diagonals": 150}],
    "xattention": [{"tau": 0.5}],
}


@pytest.fixture(scope="module")
def gates_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    gates.save(path, {0: untaught(3, 64, Rotation(10000.0 ** -(torch.arange(32) / 32)))}, {})
    return str(path)


def moved(view: View) -> View:
    q, (k, v) = Away(view.q.contiguous()), view.read()
    k, v = Away(k), Away(v)
    its = view.tile, view.scale, view.prompt_len, view.heads, view.num_heads, view.layer
    return View(q, view.seq_len, *its, lambda: (k, v))


def waited_for(policy: ListSelector) -> list[str]:
    """What the host waits for while it chooses, when it has done so before."""
    waits: list[str] = []
    for rows, seq_len in ((300, 1200), (70, 200)):
        view = view_of(step(8, rows, seq_len, heads=3), policy.tile, seq_len + 100)
        wanted = kept_tiles(policy, view)
        for again in (False, True):
            with elsewhere() as waited:
                kept = kept_tiles(policy, moved(view))
            assert isinstance(kept, Away)
            assert torch.equal(kept.inside, wanted)
            waits += waited * again
    return waits


def test_every_selector_that_comes_with_the_package_is_here() -> None:
    assert set(FEW) == set(registry.BUILT_IN)


@pytest.mark.parametrize(("name", "more"), [(name, its) for name in FEW for its in FEW[name]])
@pytest.mark.parametrize("tile", [16, 64])
def test_it_goes_where_the_tensors_are(
    name: str, more: dict[str, Any], tile: int, gates_file: str
) -> None:
    files = {"gates": gates_file} if name == "seer" else {}
    policy = parse({"selector": name, **WINDOW, **more, **files, "tile": tile})
    assert isinstance(policy, ListSelector)
    (said,) = re.findall(r"of those that come with the package only (.*?) wait", PAGE)
    assert bool(waited_for(policy)) == (f"`{name}`" in said)


def test_the_pages_own_goes_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"^`observed.py`\n\n```python\n(.*?)^```$", RAW, re.DOTALL | re.MULTILINE)
    (tmp_path / "the_pages_observed.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    observed = import_module("the_pages_observed")
    assert not waited_for(observed.Observed(tau=0.05, **WINDOW))


def test_it_is_no_device_of_the_host() -> None:
    with elsewhere(), pytest.raises(RuntimeError, match="two devices"):
        Away(torch.ones(3)) + torch.ones(3)
    with elsewhere() as waits:
        x = Away(torch.arange(3.0))
        assert bool((x > 1).any())
        x[x > 1] = 0
        x[[0, 1]] = 1
        x.cpu()
        torch.tensor([1], device=ELSEWHERE)
    assert len(waits) == 5


def test_a_selector_that_stays_on_the_host_stops_the_start() -> None:
    with elsewhere():
        rehearse(PolicyTable([DENSE, Peak(), Strided()]), 64, ELSEWHERE)
        with pytest.raises(SelectorError, match=r"'nothing' .* on meta, got .* on cpu"):
            rehearse(PolicyTable([Peak(), Nothing()]), 64, ELSEWHERE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_around_it_waits(dtype: torch.dtype) -> None:
    table = PolicyTable(
        [
            Strided(stride=3, **WINDOW),
            VerticalSlash(columns=30, diagonals=100, tile=64, **WINDOW),
            Peak(tau=0.6, tile=32, **WINDOW),
            Strided(stride=3, **WINDOW),
        ],
        [0, 200, 0, 0],
        Place(3, 4, 8),
    )
    batch = [make_qkv(r, *shape, dtype=dtype) for r, shape in enumerate([(70, 130), (100, 600)])]
    paged = make_paged(batch, "strided", 16)
    starts, lengths = np.array([0, 70, 170]), np.array([130, 600])
    prompts = np.array([900, 600])

    def bits(waits: list[str], q: torch.Tensor, *paged: torch.Tensor) -> torch.Tensor:
        work = plan_work(starts, lengths, [0, 1], q.device, prompts)
        work.shares()  # what a step copies once
        waits.clear()
        shape = len(work.blocks), 4, -(-work.subtiles // 32)
        mask = torch.zeros(shape, dtype=torch.int32, device=q.device)
        cache, block_table = paged
        set_bits(q, cache, block_table, work, table, 0.125, mask)
        return mask

    tensors = paged.q, paged.kv_cache, paged.block_table
    wanted = bits([], *tensors)
    with elsewhere() as waits:
        mask = bits(waits, *(Away(x) for x in tensors))
        assert not waits
    assert isinstance(mask, Away)
    assert torch.equal(mask.inside, wanted)
    assert bool((wanted != 0).any())


def test_what_a_step_takes_is_taken_once_for_heads_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[View] = []
    keep = Strided.keep

    def saved(self: Strided, view: View) -> torch.Tensor:
        views.append(view)
        assert view.k.shape == view.v.shape == (1000, 64)
        return keep(self, view)

    monkeypatch.setattr(Strided, "keep", saved)
    one, other = Strided(), Strided(stride=4, tile=64)
    rows: list[AnyPolicy] = [one, DENSE, one, DENSE, other, one, DENSE, DENSE]
    q = torch.full((200, 8, 64), torch.nan, dtype=torch.bfloat16)
    table = PolicyTable(rows, place=Place(5, 8, 16))
    with elsewhere() as waits:
        choose_of_zeros(Away(q), 4, 1000, table, 0.125)
    assert not waits
    assert [(view.heads, view.layer, view.q.shape) for view in views] == [
        ((8,), 5, (1, 200, 64)),
        ((12,), 5, (1, 200, 64)),
        ((13,), 5, (1, 200, 64)),
    ]
    assert all(view.seq_len == view.prompt_len == 1000 for view in views)
