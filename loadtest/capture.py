"""Queries, keys and values of SmolLM2's layers on real text, kept beside the converted model.

    python loadtest/capture.py --length 8192 --text code

Nothing of it is committed: 8K tokens of one layer are 16 MB.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from inputs import Layer
from quality import Task, make_documents, rope_options

from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.ops import sparse_attention
from vllm_sparse_backend.selection import DENSE

LAYERS = (2, 8, 14, 20, 26)  # of 30
ATTENTION = "sparse_prefill_capture"  # its name in transformers


def captured(length: int, text: Task) -> list[Layer]:
    """The layers `LAYERS`, after RoPE, in bfloat16; captured now unless they have been before."""
    from safetensors.torch import load_file

    path = _path(length, text)
    if not path.exists():
        print(f"capturing {length} tokens of {text}, once", file=sys.stderr)
        capture(length, text)
    tensors = load_file(path)
    return [
        Layer(tensors[f"q.{i}"], tensors[f"k.{i}"], tensors[f"v.{i}"], number=i) for i in LAYERS
    ]


def capture(length: int, text: Task) -> Path:
    """Run the model once, with every tile kept, and write what its layers attend with.

    Beyond 8192 tokens RoPE is scaled as in the demo. Raises what typer shows if there is not
    that much text.
    """
    from safetensors.torch import save_file
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    folder = ensure_model()
    AttentionInterface.register(ATTENTION, _attention)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    (document,) = make_documents(encode, text, length, 1, seed=0)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=ATTENTION, **rope_options(length)
    ).eval()
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        model.model(input_ids=torch.tensor([document.ids]), use_cache=False, kept=kept)
    path = _path(length, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)
    return path


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *mask: Any,  # there is none: this attention is causal by itself
    kept: dict[str, torch.Tensor],
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query [1, Hq, T, D], key and value [1, Hkv, S, D]."""
    q, k, v = (x[0].transpose(0, 1).bfloat16().contiguous() for x in (query, key, value))
    if module.layer_idx in LAYERS:
        kept |= {f"{name}.{module.layer_idx}": x for name, x in zip("qkv", (q, k, v), strict=True)}
    return sparse_attention(q, k, v, DENSE, scaling)[0][None].to(query.dtype), None


def _path(length: int, text: Task) -> Path:
    return ensure_model().parent / "captured" / f"{text}-{length}.safetensors"


def main(
    length: Annotated[list[int], typer.Option(min=256, help="Tokens; repeat.")],
    text: Annotated[Task, typer.Option(help="code, docs or copy.")] = Task.CODE,
) -> None:
    """Capture real attention for `kernels.py --input captured`, anew."""
    for tokens in length:
        path = capture(tokens, text)
        print(f"{path} ({path.stat().st_size >> 20} MB)")


if __name__ == "__main__":
    typer.run(main)
