"""`python -m tools.gpu_check.model`: predicted times of a whole prompt's attention.

Instructions as compiled, rates as published; nothing is timed. The better prediction lets a
multiprocessor's matrix units work while others issue, the worse one adds the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import BaseModel
from rich.console import Console

from tools.gpu_check.judge import Result
from tools.gpu_check.machine import Kind
from tools.gpu_check.peaks import FA2_SHARE, GPUS, PUBLISHED, SPECIAL_LANES, WARPS_ISSUED, Gpu
from tools.gpu_check.pool import judge_all
from tools.gpu_check.variants import Cell, variants
from vllm_sparse_backend.ops.tiles import Q_BLOCK
from vllm_sparse_backend.ops.triton.kept import Shelf, kept_bytes
from vllm_sparse_backend.selection import UNIFORM_DEFAULT

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128  # Llama-3.1-8B
GROUP = HEADS // KV_HEADS
ROWS: Final = Q_BLOCK // UNIFORM_DEFAULT.row_stride * GROUP  # scored together


@dataclass(frozen=True, slots=True)
class Way:
    """To prefill a prompt."""

    chunked: bool = True  # by vLLM's own default for the GPU
    kept: bool = False  # codes, from one chunk to the next
    fp4: bool = False  # codes are 4-bit floats, multiplied as such

    @property
    def name(self) -> str:
        """For people."""
        text = "in chunks" if self.chunked else "whole"
        return text + (", codes kept" if self.kept else "") + (", fp4" if self.fp4 else "")

    @property
    def policies(self) -> str:
        """As `variants.POLICIES` has them."""
        return "sale fp4" if self.fp4 else "sale"


WAYS: Final = tuple(
    Way(chunked, kept, fp4)
    for fp4 in (False, True)
    for chunked, kept in ((True, False), (True, True), (False, False))
)
# docs/limits.md, the default policy: SmolLM2's layers on real text up to 16K, generated input for a
# Llama layer from there on.
DENSITY: Final = {8192: 0.305, 16384: 0.274, 32768: 0.077, 65536: 0.059, 131072: 0.052}
PHASES: Final = ("quantize", "anchor", "score", "compact", "attend")
DOCS = Path(__file__).parents[2] / "docs"


class Prediction(BaseModel):
    """Milliseconds of all layers' attention of one prompt."""

    gpu: str
    tokens: int
    prefill: str
    phases: dict[str, tuple[float, float]]  # better, worse
    dense: float

    @property
    def selection(self) -> tuple[float, float]:
        """Percent of dense attention's time: all phases but `attend`."""
        best, worst = (
            100 * sum(self.phases[phase][i] for phase in PHASES[:-1]) / self.dense for i in (0, 1)
        )
        return best, worst

    @property
    def total(self) -> tuple[float, float]:
        """All phases."""
        best, worst = (sum(times[i] for times in self.phases.values()) for i in (0, 1))
        return best, worst


def predict(
    gpu: Gpu, kernels: dict[str, Result], tokens: int, density: float, way: Way
) -> Prediction:
    """One prompt of ``tokens``, by ``kernels`` compiled for the GPU's architecture."""
    step = min(gpu.chunk, tokens) if way.chunked else tokens
    contexts = range(step, tokens + 1, step)
    blocks = tokens // Q_BLOCK
    pairs = tokens * tokens / 2 / Q_BLOCK  # (q block, causal key)
    window = UNIFORM_DEFAULT.sink + UNIFORM_DEFAULT.local + Q_BLOCK
    summed, coded = keys_read(contexts, way.kept)
    # Read in bf16, written a byte each or half of one.
    moved = (summed * 2 + coded * (2.5 if way.fp4 else 3)) * KV_HEADS * DIM
    attend, anchor, score = (
        kernels[name] for name in ("attend_tiles", "anchor_rows", "score_tiles")
    )
    work = {
        "anchor": (anchor, blocks * KV_HEADS * (window / anchor.block + 1), ROWS, 2 * gpu.bf16),
        "score": (
            score,
            pairs * KV_HEADS / score.block,
            ROWS,
            2 * (gpu.fp4 if way.fp4 else gpu.int8),
        ),
        "compact": (kernels["compact_tiles"], pairs / 16 * HEADS / 1024, 0, gpu.bf16),
        "attend": (attend, density * pairs * HEADS / attend.block, Q_BLOCK, gpu.bf16),
    }
    phases = {"quantize": (moved / gpu.bandwidth, moved / gpu.bandwidth)}
    for phase, (kernel, all_products, own_rows, peak) in work.items():
        rows = kernel.rows or own_rows
        products = all_products * own_rows / rows if rows else all_products
        better, worse = product_seconds(gpu, kernel, peak, rows)
        phases[phase] = products * better, products * worse
    dense = 4 * HEADS * DIM * tokens * tokens / 2 / (gpu.bf16 * gpu.dense_share)
    return Prediction(
        gpu=gpu.name,
        tokens=tokens,
        prefill=way.name,
        phases={p: (1e3 * LAYERS * a, 1e3 * LAYERS * b) for p, (a, b) in phases.items()},
        dense=1e3 * LAYERS * dense,
    )


def product_seconds(
    gpu: Gpu, kernel: Result, peak: float, rows: int, dim: int = DIM
) -> tuple[float, float]:
    """What a whole GPU takes for one product of so many rows, better and worse, for each that it
    does. ``peak``: twice the rate where a product is one matrix product and not attention's two.
    """
    rate = gpu.per_clock(peak) * (gpu.few_rows if rows < 128 else 1)
    tensor = 4 * rows * kernel.block * dim / rate
    issue = kernel.total * kernel.warps / WARPS_ISSUED
    special = kernel.instructions[Kind.SPECIAL] * kernel.warps * 32 / SPECIAL_LANES
    other = max(issue, special)
    seconds = 1 / (gpu.multiprocessors * gpu.clock)
    return max(tensor, other) * seconds, (tensor + other) * seconds


def keys_read(contexts: Sequence[int], kept: bool) -> tuple[int, int]:
    """How many keys are summed for a mean, and how many made codes, in steps of such contexts."""
    if not kept:
        return sum(contexts), sum(contexts)
    shelf, summed, coded, computed = Shelf(1, contexts[-1]), 0, 0, 0
    for context in contexts:
        shelf.step()
        place = shelf.place(0, computed, context, contexts[-1] + 1)
        assert place is not None
        summed += place.mean_of if place.new_mean else 0
        coded += context - place.have
        computed = context
    return summed, coded


def predict_all(results: Iterable[Result]) -> list[Prediction]:
    """Each GPU, length and way to prefill, by what its kernels compile to."""
    by_cell: dict[tuple[str, str], dict[str, Result]] = {}
    for one in results:
        for policies in ("sale", "sale fp4"):  # kernels that know no codes are compiled for one
            if policies == one.policies or one.kernel not in by_cell.get((one.arch, policies), {}):
                by_cell.setdefault((one.arch, policies), {})[one.kernel] = one
    return [
        predict(gpu, by_cell[gpu.arch, way.policies], tokens, density, way)
        for gpu in GPUS
        for way in ways_of(gpu)
        for tokens, density in DENSITY.items()
    ]


def ways_of(gpu: Gpu) -> list[Way]:
    """To prefill on it."""
    return [way for way in WAYS if gpu.fp4 or not way.fp4]


_HEAD: Final = """\
# PREDICTED times on GPUs

**A prediction, not a measurement**: nothing on this page has run on a GPU. Written by
`make gpu-model` from the instructions that the kernels compile to (gpu-check.md) and published
peaks (`tools/gpu_check/peaks.py`). Attention of all 32 layers of Llama-3.1-8B (32 q and 8 kv
heads, head_dim 128, bfloat16), the uniform default policy, milliseconds. Each range is from perfect
overlap of matrix units with all else, to none. Left out: what shared memory, caches, launches and
uneven work cost, so the truth may lie above either end.

Densities are measured ones (limits.md): {density}. Up to 16K they are of SmolLM2 on real text, from
32K on of generated input for a Llama layer, which explains the step between them.

*Dense*: {dense}.
*In chunks*: as a server has them unless told otherwise, of {chunks} tokens.
*Selection*: all but attention, in percent of dense. *Codes kept*: with `kept_prompts`, which for a
prompt of 128K takes {kept_gib:.1f} GiB; without it a chunk's keys are all quantized anew. *fp4*:
with `"bits": "fp4"`, codes that the matrix units multiply as 4-bit floats and that take half the
memory; at an equal error 1% more tiles are kept (limits.md), which is not reckoned with here.

Percent of dense that selection is predicted to take at 64K; wanted is 8 at most:

{shares}"""


def page(predictions: list[Prediction]) -> str:
    """docs/gpu-model.md."""
    text = _HEAD.format(
        density=", ".join(f"{d:.3f} at {n // 1024}K" for n, d in DENSITY.items()),
        dense=", ".join(f"{g.dense} at {g.dense_share:.0%} of {g.name}'s peak" for g in GPUS),
        chunks=", ".join(f"{g.chunk} ({g.name})" for g in GPUS),
        kept_gib=kept_bytes(1, 131072, KV_HEADS, DIM) * LAYERS / 2**30,
        shares=_shares([p for p in predictions if p.tokens == 65536]),
    )
    columns = ("tokens", *PHASES, "sum", "dense", "selection", "x dense")
    for gpu in GPUS:
        for way in ways_of(gpu):
            text += f"\n## PREDICTION: {gpu.name}, {way.name}\n\n"
            published = gpu.name == "RTX 4090"
            heads = (*columns, *(("FA2, published", "SALE, published") if published else ()))
            text += "| " + " | ".join(heads) + " |\n" + "|---:" * len(heads) + "|\n"
            for p in predictions:
                if (p.gpu, p.prefill) == (gpu.name, way.name):
                    text += "| " + " | ".join(_row(p, published)) + " |\n"
    return text


def _shares(predictions: list[Prediction]) -> str:
    """What selection takes at one length, by the way to prefill."""
    text = "| | " + " | ".join(gpu.name for gpu in GPUS)
    text += " | of FA2: " + " | of FA2: ".join(FA2_SHARE) + " |\n"
    text += "|---" + "|---:" * (len(GPUS) + len(FA2_SHARE)) + "|\n"
    for way in WAYS:
        own = {p.gpu: p.selection for p in predictions if p.prefill == way.name}
        shares = {gpu.name: (own[gpu.name], gpu.dense_share) for gpu in GPUS if gpu.name in own}
        of_fa2 = {
            name: tuple(x * FA2_SHARE[name] / dense for x in share)
            for name, (share, dense) in shares.items()
            if name in FA2_SHARE
        }
        cells = [way.name]
        cells += [_span(*own[gpu.name]) if gpu.name in own else "" for gpu in GPUS]
        cells += [_span(*of_fa2[name]) if name in of_fa2 else "" for name in FA2_SHARE]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def _row(p: Prediction, published: bool) -> list[str]:
    best, worst = p.total
    row = [f"{p.tokens:,}", *(_span(*p.phases[phase]) for phase in PHASES), _span(best, worst)]
    row += [f"{p.dense:,.0f}", f"{_span(*p.selection)}%"]
    row.append(f"{p.dense / worst:.1f} to {p.dense / best:.1f}")
    if published:
        known = PUBLISHED[p.tokens]
        row += [f"{known['FA2']:,}", f"{known['select']:,} + {known['compute']:,}"]
    return row


def _span(low: float, high: float) -> str:
    texts = [f"{x:,.0f}" if x >= 100 else f"{x:.1f}" for x in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="to stdout, and no page")] = False,
) -> None:
    """Compile what the model needs, predict, and write docs/gpu-model.md."""
    wanted = variants(
        Cell(gpu.arch, DIM, GROUP, policies=policies)
        for gpu in GPUS
        for policies in dict.fromkeys(way.policies for way in ways_of(gpu))
    )
    predictions = predict_all(result for _, result in judge_all(wanted))
    if as_json:
        print(json.dumps([p.model_dump() for p in predictions], indent=1))
        return
    (DOCS / "gpu-model.md").write_text(page(predictions))
    Console(stderr=True).print(f"wrote {DOCS / 'gpu-model.md'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
