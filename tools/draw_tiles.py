#!/usr/bin/env python3
"""Draw docs/tiles.png: which tiles three heads of the demo's model compute of real text."""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from vllm_sparse_backend import sparse_attention
from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.text import build_document
from vllm_sparse_backend.ops import TileList, layout, select_tiles
from vllm_sparse_backend.selection import Sale, Static

TOKENS = 4096
HEADS = ((2, 4), (12, 0), (20, 7))  # layer, head
POLICY = Sale()
BEHIND, SKIPPED, SELECTED, WINDOW = range(4)
COLOURS = ("#ffffff", "#eceff4", "#d9822b", "#3b6ea5")


def capture(layers: set[int]) -> dict[int, tuple[TileList, TileList]]:
    """The tiles of each layer's heads on one document: all kept, and sink and local alone."""
    found = {}

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **more: Any
    ) -> tuple[torch.Tensor, None]:
        rows, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        if module.layer_idx in layers:
            cache = layout.pack(keys, values)
            pages = torch.arange(len(cache), dtype=torch.int32)[None]
            edges = torch.tensor([0, len(rows)], dtype=torch.int32)
            batch = (rows, cache, pages, edges, edges[1:])
            window = Static(sink=POLICY.sink, local=POLICY.local, tile=POLICY.tile)
            found[module.layer_idx] = select_tiles(*batch, POLICY), select_tiles(*batch, window)
        return sparse_attention(rows, keys, values, {"selector": "dense"})[0][None], None

    AttentionInterface.register("capture", attention)
    folder = ensure_model()
    document = build_document(AutoTokenizer.from_pretrained(folder), TOKENS, seed=0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="capture"
    )
    with torch.no_grad():
        model.model(torch.tensor([document.token_ids]))
    return found


def draw(target: str) -> None:
    """One panel a head: query tokens downwards, key tokens to the right."""
    tiles = capture({layer for layer, _ in HEADS})
    figure, axes = plt.subplots(1, len(HEADS), figsize=(11, 4.3), sharey=True)
    for axis, (layer, head) in zip(axes, HEADS, strict=True):
        kept, window = (made.mask(head) for made in tiles[layer])
        picture = torch.full(kept.shape, SKIPPED)
        picture[kept] = SELECTED
        picture[window] = WINDOW
        for block, edges in enumerate(tiles[layer][0].blocks):
            picture[block, -(-edges.end // POLICY.tile) :] = BEHIND
        axis.imshow(
            picture, ListedColormap(COLOURS), vmin=0, vmax=3, interpolation="nearest",
            extent=(0, TOKENS, TOKENS, 0),
        )  # fmt: skip
        density = tiles[layer][0].computed[head] / tiles[layer][0].causal[head]
        axis.set_title(f"layer {layer}, head {head}: density {density:.2f}", fontsize=10)
        axis.set_xlabel("key token")
    axes[0].set_ylabel("query token")
    names = ("not computed", "kept by the selector", "sink and local window")
    patches = [Patch(color=c, label=n) for c, n in zip(COLOURS[1:], names, strict=True)]
    figure.legend(handles=patches, loc="lower center", ncols=3, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "docs/tiles.png")
