"""The policies that calibration chooses from: a ladder of settings for each selector.

The settings of a fused selector's ladder are nested: what one keeps, every one before it keeps,
too. So one look at a q block's scores says for each tile how far down the ladder it is kept, and
with that what every setting would do, which replaces a search for one threshold after the other.
What list selectors keep under a setting is asked of themselves, setting by setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from pydantic import ValidationError

from vllm_sparse_backend.errors import SelectorError, describe
from vllm_sparse_backend.ops.listed import rehearse
from vllm_sparse_backend.ops.policies import Place, PolicyTable
from vllm_sparse_backend.ops.tiles import QBlock
from vllm_sparse_backend.options import Refused
from vllm_sparse_backend.profile import ModelFacts
from vllm_sparse_backend.selection import ListSelector, Mass, Sale, Static, registry
from vllm_sparse_backend.selection.estimate import Block, by_tile
from vllm_sparse_backend.selection.policy import TAU_CONTEXT

Setting: TypeAlias = Static | Sale | Mass | ListSelector

SALE_START = 0.008  # where SALE's own calibration begins, to halve from there
STEPS_PER_OCTAVE = 4
THRESHOLDS = tuple(
    float(f"{SALE_START * 2 ** (step / STEPS_PER_OCTAVE):.3g}") for step in range(-24, 19)
)
WINDOWS = (8192, 4096, 2048, 1024, 512, 256)  # the last is what every other selector keeps, too
# With these a threshold moves by whole steps of the ladder from one octave of context to the next,
# and to an octave's middle, which is half of one from where `tau` stands.
SLOPES = (0.0, -0.5, -1.0)
# By row stride, what estimates are made under: the thresholds' logarithms are then all there is to
# compare scores with. Some heads have rows with needs of their own, such as those that copy: what
# such a row wants is missed where it lies between two that are scored.
SCORED: dict[int, Sale] = {n: Sale(tau=1.0, row_stride=n) for n in (Sale().row_stride, 1)}
TILE = Sale().tile


@dataclass(frozen=True)
class Ladder:
    """One selector's settings, from what keeps most to what keeps least."""

    selector: str
    settings: tuple[Setting, ...]
    slopes: tuple[float, ...] = (0.0,)

    @property
    def row_stride(self) -> int:
        """Of the rows that its settings score; 0 where they score none."""
        return getattr(self.settings[0], "row_stride", 0)

    @property
    def name(self) -> str:
        """For people: a selector may have several."""
        return self.selector + (", every row scored" if self.row_stride == 1 else "")

    @property
    def listed(self) -> bool:
        """Whether it is a list selector's."""
        return isinstance(self.settings[0], ListSelector)

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
    Ladder("sale", tuple(Sale(tau=tau, row_stride=1) for tau in THRESHOLDS), SLOPES),
    Ladder("mass", tuple(Mass(tau=tau, row_stride=1) for tau in THRESHOLDS), SLOPES),
)

FUSED = tuple(dict.fromkeys(ladder.selector for ladder in LADDERS))


def list_ladder(name: str) -> tuple[ListSelector, ...]:
    """The settings of the list selector of that name, which there is. Raises Refused if it has none
    of its own, and SelectorError if it cannot be used."""
    selector = registry.find(name)
    assert selector is not None
    try:
        settings = selector.ladder()
    except ValidationError as error:  # of one that cannot do without a file, say
        raise Refused(f"no settings of its own ({describe(error)})") from None
    if not settings:
        raise Refused("no settings of its own")
    return settings


def why_unusable(
    settings: Iterable[ListSelector], facts: ModelFacts, layers: Sequence[int]
) -> str | None:
    """Why settings cannot choose for these layers of a model, a missing file for one; None: they
    can. Each is tried once in each layer. What else selectors raise passes through."""
    heads = facts.num_heads
    try:
        for policy in settings:
            for layer in layers:
                table = PolicyTable([policy] * heads, place=Place(layer, 0, heads))
                rehearse(table, facts.head_dim)
    except (SelectorError, OSError) as error:
        return str(error)
    return None


def ladders_of(methods: Sequence[str]) -> tuple[Ladder, ...]:
    """The fused ones, which are measured all at once, and those of the list selectors named.
    Raises as `list_ladder`."""
    listed = (name for name in methods if name not in FUSED)
    return LADDERS + tuple(Ladder(name, list_ladder(name)) for name in listed)


def octave_of(context: int) -> int:
    """The smallest k for which 2^k is no less than so many tokens."""
    return max(0, context - 1).bit_length()


def levels(ladder: Ladder, block: QBlock, scores: Block) -> torch.Tensor:
    """How many of a fused ladder's settings keep each tile of a q block, int64 [causal tiles].

    ``scores``: the block's estimates under ``SCORED``, of the ladder's rows. Exponentials are exact
    here and linear between powers of two in the kernels, so that a tile's place on the ladder of
    ``mass`` may be off by 6%, a third of a step.
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
