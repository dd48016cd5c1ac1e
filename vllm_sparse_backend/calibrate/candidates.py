"""The policies that calibration chooses from: a ladder of settings for each selector.

The settings of a ladder are nested: what one keeps, every one before it keeps, too. So one look at
a q block's scores says for each tile how far down the ladder it is kept, and with that what every
setting would do, which replaces a search for one threshold after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vllm_sparse_backend.ops.tiles import QBlock
from vllm_sparse_backend.selection import Mass, Sale, Static
from vllm_sparse_backend.selection.estimate import Block, by_tile
from vllm_sparse_backend.selection.policy import TAU_CONTEXT

Setting: TypeAlias = Static | Sale | Mass

SALE_START = 0.008  # where SALE's own calibration begins, to halve from there
STEPS_PER_OCTAVE = 4
THRESHOLDS = tuple(
    float(f"{SALE_START * 2 ** (step / STEPS_PER_OCTAVE):.3g}") for step in range(-24, 19)
)
WINDOWS = (8192, 4096, 2048, 1024, 512, 256)  # the last is what every other selector keeps, too
# With these a threshold moves by whole steps of the ladder from one octave of context to the next,
# and to an octave's middle, which is half of one from where `tau` stands.
SLOPES = (0.0, -0.5, -1.0)
SCORED = Sale(tau=1.0)  # the thresholds' logarithms are then all there is to compare scores with
TILE = SCORED.tile


@dataclass(frozen=True)
class Ladder:
    """One selector's settings, from what keeps most to what keeps least."""

    selector: str
    settings: tuple[Setting, ...]
    slopes: tuple[float, ...] = (0.0,)

    def at(self, index: int, slope: float) -> Setting:
        """A setting whose threshold follows the context with that exponent."""
        setting = self.settings[index]
        return setting.model_copy(update={"tau_slope": slope}) if slope else setting

    def moved(self, slope: float, octave: int) -> int:
        """How many settings further down a threshold is in the middle of an octave of context.

        ``octave`` k: contexts from 2^(k - 1), exclusive, to 2^k. Rounded to what keeps more.
        """
        return math.floor(slope * (octave - 0.5 - math.log2(TAU_CONTEXT)) * STEPS_PER_OCTAVE)


LADDERS = (
    Ladder("sale", tuple(Sale(tau=tau) for tau in THRESHOLDS), SLOPES),
    Ladder("mass", tuple(Mass(tau=tau) for tau in THRESHOLDS), SLOPES),
    Ladder("static", tuple(Static(local=local) for local in WINDOWS)),
)


def octave_of(context: int) -> int:
    """The smallest k for which 2^k is no less than so many tokens."""
    return max(0, context - 1).bit_length()


def levels(ladder: Ladder, block: QBlock, scores: Block) -> torch.Tensor:
    """How many of a ladder's settings keep each tile of a q block, int64 [causal tiles].

    ``scores``: the block's estimates under ``SCORED``. Exponentials are exact here and linear
    between powers of two in the kernels, so that a tile's place on the ladder of ``mass`` may be
    off by 6%, a third of a step.
    """
    if ladder.selector == "static":
        distance = block.start - TILE * torch.arange(1, len(scores.always) + 1)
        kept = (torch.tensor(WINDOWS) > distance[:, None]).sum(1)
    else:
        if ladder.selector == "sale":
            best = by_tile(scores.excess, TILE, -torch.inf).amax((0, 2))
        else:
            best = by_tile(scores.excess.exp(), TILE, 0.0).sum(2).amax(0).log()
        edges = torch.tensor(THRESHOLDS).log()
        # What cannot be judged is kept, as by the kernels.
        kept = torch.searchsorted(edges, best.nan_to_num(torch.inf))
    return torch.where(scores.always, len(ladder.settings), kept)
