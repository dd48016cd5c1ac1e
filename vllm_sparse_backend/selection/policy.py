"""Policies: which selector a head uses, and with which parameters.

A policy is data: frozen, validated, comparable, the same object in a profile, in the
ops' arguments and in a report. It knows neither torch nor the kernels.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Tile: TypeAlias = Literal[16, 32, 64]
Bits: TypeAlias = Literal[4, 6, 8, "fp4"]  # of the codes that scores are products of
Q_BLOCK = 64  # query tokens; `ops.tiles` has the same
TAU_CONTEXT = 8192  # tokens of context at which a threshold is `tau` whatever its slope


class _Policy(BaseModel):
    # allow_inf_nan: a NaN threshold would compare false with every score and so drop
    # every tile; it must never get as far as a kernel.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Dense(_Policy):
    """Every causal tile is computed."""

    selector: Literal["dense"] = "dense"


class Windowed(_Policy):
    """What every sparse selector keeps whatever the scores say."""

    sink: int = Field(default=64, ge=1, le=1 << 20, description="first tokens always kept")
    local: int = Field(
        default=256, ge=0, le=1 << 20, description="tokens before the q block always kept"
    )
    growth: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="how the window grows (MoA): at n tokens of context it is local + growth * n",
    )
    tile: Tile = Field(default=16, description="key tokens per tile")

    @property
    def growth_units(self) -> int:
        """``growth`` in 1/65536: kernels and reference then agree to the token."""
        return round(self.growth * 65536)

    def window_at(self, context: int) -> int:
        """Tokens always kept before a q block that ends at so many tokens of context."""
        return self.local + (self.growth_units * context >> 16)


class Static(Windowed):
    """Sink and a local window, nothing else (MInference's A-shape; if it grows, MoA's spans)."""

    selector: Literal["static"] = "static"
    local: int = Field(default=1024, ge=0, le=1 << 20)


class _Scored(Windowed):
    """What selectors share that score keys for some of a q block's query rows.

    Scores are products of codes of Q and K. Of 8 bits they are integers to 127 for keys and 63
    for queries, of 6 to 31 and of 4 to 7; "fp4" are the 4-bit floats E2M1 (OCP Microscaling
    Formats 1.0), counted in halves: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
    """

    tau: float = Field(default=0.002, ge=0.0, le=1.0)
    tau_slope: float = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="the threshold of a q block that ends at n tokens of context is "
        "tau * (n / 8192) ** tau_slope",
    )
    bits: Bits = Field(
        default=6,
        description="of the codes that scores are products of: integers, or fp4, floats of 4 bits, "
        "which some GPUs multiply faster",
    )
    row_stride: Literal[1, 2, 4, 8] = Field(
        default=4,
        description="query rows per scored row, which are spread over a q block evenly, both ends "
        "included; the paper of SALE scores every row",
    )
    # A question stands at the end of its prompt, and a row of it that is not scored may be the
    # one that looks for the answer.
    tail: int = Field(
        default=128,
        ge=0,
        le=1 << 20,
        description="last tokens of a prompt, all scored; where its length is not known, of every "
        "step",
    )

    def tau_at(self, context: int) -> float:
        """The threshold of a q block that ends at so many tokens of context.

        What a fixed threshold keeps drifts with the length (BLASST, arXiv 2512.12087, scales its
        own with the inverse of it).
        """
        return self.tau * (context / TAU_CONTEXT) ** self.tau_slope


class Sale(_Scored):
    """SALE's relative attention score (arXiv 2505.24179, section 3.2).

    With ``m`` and ``l`` a row's maximum and sum over sink and local tiles, a further
    tile is kept if any scored element of it reaches ``exp(s - m) / l > tau``. ``tau = 0``
    keeps everything. The paper's own setting: sink 32, local 128 to 256, tile 32, bits 4,
    row_stride 1, tail 0, tau 0.008.
    """

    selector: Literal["sale"] = "sale"


class Mass(_Scored):
    """The softmax mass of a tile in a row, relative to what sink and local tiles hold.

    With ``m`` and ``l`` as in ``Sale``, a further tile is kept if in any scored row the sum
    of ``exp(s - m) / l`` over its keys exceeds ``tau``. ``tau = 0`` keeps everything.
    """

    selector: Literal["mass"] = "mass"
    tau: float = Field(default=0.005, ge=0.0, le=1.0)


FUSED = (Dense, Static, Sale, Mass)  # what the native kernels select by themselves

DENSE = Dense()
# What a model without a profile gets: on the safe side of the thresholds that were
# measured to leave perplexity, needles and copying unharmed.
UNIFORM_DEFAULT = Sale()
