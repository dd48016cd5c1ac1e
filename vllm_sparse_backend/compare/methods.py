"""What is compared: each method over its settings, and profiles.

A method is a selector with its ladder, from the setting that keeps most to the one that keeps
least: the fused ones here, list selectors by their own `ladder`, ours and others' alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_sparse_backend.calibrate.candidates import list_ladder
from vllm_sparse_backend.options import Refused, parse_names
from vllm_sparse_backend.profile import Profile
from vllm_sparse_backend.selection import (
    DENSE,
    UNIFORM_DEFAULT,
    AnyPolicy,
    ListSelector,
    Mass,
    Sale,
    Static,
    label,
    main_parameter,
    registry,
)

KEEP_ALL, PAPER = "dense", "sale-paper"  # names of methods
# SALE as its paper has it (arXiv 2505.24179, section 4): 4 bits, every row, tiles of 32 keys.
SALE_PAPER = Sale(tau=0.008, sink=32, local=256, tile=32, bits=4, row_stride=1, tail=0)
PAPER_THRESHOLDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
FACTORS = (0.25, 0.5, 1, 2, 4, 8, 16)  # of a default threshold
WINDOWS = (8192, 4096, 2048, 1024, 512)
GROWTHS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.06)


@dataclass(frozen=True)
class Setting:
    """What the heads follow: all one policy, or each its own of a profile."""

    policies: AnyPolicy | Profile

    @property
    def name(self) -> str:
        """For people."""
        if isinstance(self.policies, Profile):
            return f"profile {self.policies.name}"
        return label(self.policies)

    @property
    def kind(self) -> str:
        """A selector's name, or that it is a profile."""
        return "profile" if self.policy is None else self.policy.selector

    @property
    def policy(self) -> AnyPolicy | None:
        """Of all heads; None: they have a profile."""
        return None if isinstance(self.policies, Profile) else self.policies

    @property
    def digest(self) -> str:
        """Of a profile; "" otherwise."""
        return self.policies.digest if isinstance(self.policies, Profile) else ""

    def kinds(self) -> set[AnyPolicy]:
        """All policies that there are in it."""
        if isinstance(self.policies, Profile):
            return set(self.policies.kinds())
        return {self.policies}

    def rows(self, layer: int, heads: int) -> list[AnyPolicy]:
        """A policy for each head of a layer."""
        if isinstance(self.policies, Profile):
            return self.policies.for_layer(layer)
        return [self.policies] * heads

    def identity(self, layer: int, heads: int) -> Any:
        """What a measurement in that layer depends on: of a profile no other layers."""
        return [policy.model_dump(mode="json") for policy in self.rows(layer, heads)]


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    what: str
    settings: tuple[Setting, ...]
    own: bool = False  # the rule and its granularity are this package's

    @property
    def listed(self) -> bool:
        """Whether it chooses in torch, before the native attention."""
        return any(isinstance(setting.policies, ListSelector) for setting in self.settings)


@dataclass
class Chosen:
    """The methods, and why some are missing. ``asked``: names of those that must not be. (What is
    there for a --policy or a --profile was asked for, too.)"""

    methods: list[Method]
    asked: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, why: str) -> None:
        """Raises Refused for one that was asked for."""
        if name in self.asked or name not in names():
            option = "--methods " if name in self.asked else ""
            raise Refused(f"{option}{name}: {why}")
        self.methods = [method for method in self.methods if method.name != name]
        if not any(setting.kind == name for it in self.methods for setting in it.settings):
            self.left_out[name] = why


def fused() -> list[Method]:
    """The methods of the native kernels, and every tile kept."""
    return [
        Method(KEEP_ALL, "every tile, by this package's kernel", _of([DENSE])),
        _thresholds(
            Sale(),
            "kept if a scored element of the tile reaches tau of its row's sum over sink and "
            "window; tiles of 16, every fourth row",
        ),
        Method(
            PAPER,
            "the same rule at its paper's granularity: 4 bits, tiles of 32, every row",
            _of(SALE_PAPER.model_copy(update={"tau": tau}) for tau in PAPER_THRESHOLDS),
        ),
        _thresholds(Mass(), "the estimates of sale, summed over a tile's keys"),
        Method(
            "static",
            "sink and a local window (StreamingLLM, MInference's A-shape)",
            _of(Static(local=local) for local in WINDOWS),
        ),
        Method(
            "static-growth",
            "sink and a window that grows with the length (MoA's spans)",
            _of(Static(local=256, growth=growth) for growth in GROWTHS),
        ),
    ]


def _of(policies: Iterable[AnyPolicy]) -> tuple[Setting, ...]:
    return tuple(map(Setting, policies))


def _thresholds(policy: Sale | Mass, what: str) -> Method:
    """About a selector's default, or the uniform default if it is of that selector."""
    base = UNIFORM_DEFAULT if UNIFORM_DEFAULT.selector == policy.selector else policy
    taus = (min(1.0, base.tau * factor) for factor in FACTORS)
    settings = _of(base.model_copy(update={"tau": tau}) for tau in taus)
    return Method(policy.selector, what, settings, own=True)


def listed(name: str) -> Method:
    """A list selector's. Raises SelectorError if it cannot be used, Refused if it has no ladder."""
    policies = list_ladder(name)
    said = (inspect.getdoc(type(policies[0])) or name).split("\n\n")[0]
    return Method(name, " ".join(said.split()), _of(policies))


def names() -> list[str]:
    """All there are, fused ones first. Raises SelectorError."""
    return [*(method.name for method in fused()), *sorted(registry.known())]


def choose(
    wanted: str, policies: Sequence[AnyPolicy] = (), profiles: Sequence[Profile] = ()
) -> Chosen:
    """The methods that ``wanted`` names: "all", "mass,strided", "all,-strided".

    ``policies``: one whose main parameter was given is a setting, of the ladder that it differs
    from in that alone or of a method of its own; one whose was not is a whole ladder, its
    selector's with the fields that were given. ``profiles`` are a method each. What all else is
    compared with is always there: every tile kept, the uniform default's ladder, and SALE's own
    setting. Raises Refused for a name that there is not, or one asked for that has no settings, and
    SelectorError.
    """
    known = names()
    taken, asked = parse_names(wanted, known)
    chosen, without = Chosen([], asked), dict[str, str]()
    of_fused = {method.name: method for method in fused()}
    for name in known:
        if method := of_fused.get(name):
            if name in {*taken, KEEP_ALL, UNIFORM_DEFAULT.selector}:
                chosen.methods.append(method)
            elif name == PAPER:
                chosen.methods.append(replace(method, settings=_of([SALE_PAPER])))
        elif name in taken:
            try:
                chosen.methods.append(listed(name))
            except Refused as error:
                without[name] = str(error)
    for policy in policies:
        _add(chosen, policy)
    for its in profiles:
        chosen.methods.append(
            Method(f"profile {its.name}", "a policy for every head", (Setting(its),))
        )
    for name, why in without.items():
        chosen.leave_out(name, why)
    return chosen


def _add(chosen: Chosen, policy: AnyPolicy) -> None:
    """To a method that there is, or as one of its own."""
    settings, name = _of(_asked_for(policy)), label(policy, main=False)
    for place, method in enumerate(chosen.methods):
        policies = [setting.policy for setting in method.settings if setting.policy]
        alike = any(_family(its) == _family(policy) for its in policies)
        if method.name == name or (alike and len(settings) == 1):
            new = tuple(setting for setting in settings if setting not in method.settings)
            chosen.methods[place] = replace(method, settings=method.settings + new)
            return
    chosen.methods.append(Method(name, "asked for with --policy", settings, own=_is_own(policy)))


def _is_own(policy: AnyPolicy) -> bool:
    """Whether the rule and its granularity are this package's: SALE scores every row."""
    return isinstance(policy, Mass) or (isinstance(policy, Sale) and policy.row_stride > 1)


def _asked_for(policy: AnyPolicy) -> list[AnyPolicy]:
    """The policy, or the ladder that it stands for."""
    given = policy.model_fields_set - {"selector"}
    main = main_parameter(policy)
    if not main or main in given:
        return [policy]
    ladder: list[AnyPolicy] = []
    if isinstance(policy, ListSelector):
        with suppress(Refused):
            ladder = list(list_ladder(policy.selector))
    else:
        of_fused = next(method for method in fused() if method.name == policy.selector)
        ladder = [its.policy for its in of_fused.settings if its.policy]
    update = {name: getattr(policy, name) for name in given}
    return list(dict.fromkeys(its.model_copy(update=update) for its in ladder)) or [policy]


def _family(policy: AnyPolicy) -> dict[str, Any]:
    """What all settings of one ladder have in common."""
    return policy.model_dump(exclude={main_parameter(policy)})
