"""What a profile gives each (layer, head): its policy, and its density."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from vllm_sparse_backend.calibrate.results import Measurement
from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.report.measured import Found, densities
from vllm_sparse_backend.selection import (
    AnyPolicy,
    Mass,
    Policy,
    Sale,
    Static,
    label,
    main_parameter,
)

ORDER = ("dense", "static", "sale", "mass")  # then list selectors, by name


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Head(_Record):
    """One head."""

    head: int
    kind: int  # of its policy, counted in `Inspection.kinds`
    density: float | None  # None: not measured


class Layer(_Record):
    """One layer, all of its heads."""

    layer: int
    sparse: bool | None  # whether the layer can be sparse; None: nobody looked
    density: float | None  # the mean of its heads
    heads: list[Head]


class Kind(_Record):
    """One of the profile's policies."""

    policy: Policy
    label: str
    heads: int  # that follow it


class Group(_Record):
    """All of the profile's policies with one selector, by their main parameter."""

    selector: str
    heads: int
    parameter: str  # "" for dense
    least: float  # of the first policy: the lowest threshold, the longest window
    most: float
    kinds: int

    @property
    def label(self) -> str:
        """ "mass, tau 0.001 to 0.05"."""
        if not self.parameter:
            return self.selector
        spread = "" if self.most == self.least else f" to {self.most:g}"
        return f"{self.selector}, {self.parameter} {self.least:g}{spread}"


class Inspection(_Record):
    """A profile, head by head; what `inspect --json` prints."""

    profile: str
    digest: str
    model: ModelFacts
    measurement: str | None  # the file's name
    why_no_density: str
    length: int | None  # tokens of a prompt that has the densities
    density: float | None  # the mean over all layers and heads
    kinds: list[Kind]
    layers: list[Layer]


def inspect_profile(profile: Profile, found: Found, length: int | None = None) -> Inspection:
    """Everything about a profile's heads; densities at `length`, or the longest measured."""
    measurement = found.measurement
    if measurement is not None and length is None:
        length = max(measurement.lengths)
    measured = {} if measurement is None or length is None else densities(measurement, length)
    rows = [profile.for_layer(layer) for layer in range(profile.model.num_layers)]
    kinds = sorted({policy for row in rows for policy in row}, key=_place)
    layers = [_layer(number, row, kinds, measurement, measured) for number, row in enumerate(rows)]
    known = [layer.density for layer in layers if layer.density is not None]
    return Inspection(
        profile=profile.name,
        digest=profile.digest,
        model=profile.model,
        measurement=found.path.name if measurement else None,
        why_no_density=found.why_not,
        length=length if measurement else None,
        density=sum(known) / len(known) if known else None,
        kinds=[
            Kind(
                policy=policy,
                label=label(policy),
                heads=sum(row.count(policy) for row in rows),
            )
            for policy in kinds
        ],
        layers=layers,
    )


def _layer(
    number: int,
    row: list[AnyPolicy],
    kinds: list[AnyPolicy],
    measurement: Measurement | None,
    measured: dict[tuple[int, int], float],
) -> Layer:
    sparse = None if measurement is None else number in measurement.sparse_layers
    # A layer that cannot be sparse was not measured: whatever the profile says, all is computed.
    rest = 1.0 if sparse is False else None
    heads = [
        Head(head=head, kind=kinds.index(policy), density=measured.get((number, head), rest))
        for head, policy in enumerate(row)
    ]
    known = [head.density for head in heads if head.density is not None]
    return Layer(
        layer=number,
        sparse=sparse,
        density=sum(known) / len(known) if known else None,
        heads=heads,
    )


def groups(kinds: list[Kind]) -> list[Group]:
    """The kinds summed up by selector, in their order."""
    found = []
    for selector in sorted({kind.policy.selector for kind in kinds}, key=_rank):
        these = [kind for kind in kinds if kind.policy.selector == selector]
        if these:
            name = main_parameter(these[0].policy)
            values = [float(getattr(kind.policy, name)) if name else 0.0 for kind in these]
            found.append(
                Group(
                    selector=selector,
                    heads=sum(kind.heads for kind in these),
                    parameter=name,
                    least=values[0],
                    most=values[-1],
                    kinds=len(these),
                )
            )
    return found


def _place(policy: AnyPolicy) -> tuple[tuple[int, str], float, str]:
    name = main_parameter(policy)
    value = float(getattr(policy, name)) if name else 0.0
    less = -value if isinstance(policy, Static) else value
    return _rank(policy.selector), less, policy.model_dump_json()


def _rank(selector: str) -> tuple[int, str]:
    return (ORDER.index(selector) if selector in ORDER else len(ORDER)), selector


def threshold(policy: AnyPolicy) -> float | None:
    """Of a scored policy: `tau`."""
    return policy.tau if isinstance(policy, Sale | Mass) else None
