"""NVIDIA Model Optimizer's skip-softmax calibration, from a checkpoint's ``config.json``.

``sparse_attention_config.config_groups`` holds groups; that of the algorithm ``skip_softmax`` has
``threshold_scale_factor.prefill`` with ``a`` and ``b``, ``target_sparsity.prefill`` (S, 0.5 where
it is not given) and ``ignore``, the modules that stay dense, by name or pattern. At a length of L
tokens, one threshold for all heads: ``lambda = a * exp(b * S) / L``. That is how 0.45 writes it.
Earlier and by hand it may also be

- ``"sparse_algo": "softmax_skip"`` in the group, factor and target beside ``config_groups``
  (0.43, 0.44);
- a number for the factor, or for its ``prefill`` (as TensorRT-LLM takes it), which already is what
  a, b and S come to: S then says only what it was calibrated for;
- ``threshold``, a number or one of ``prefill``, where nothing was calibrated: lambda itself, at any
  length;
- one group's fields without ``config_groups`` (TensorRT-LLM's own section).

The nearest of ours is ``sale`` with ``tau = lambda``, for all heads, falling with the length as
theirs does (``tau_slope = -1``; of a ``threshold``, 0). The two are not the same:

- Theirs drops a tile whose scores all stay below the row's *maximum* so far by ``ln(lambda)``;
  SALE's rule compares with the *sum* over sink and local window, which is at least as large. The
  same number drops more here, by as much as a row's mass is spread.
- Theirs computes all of QK and saves softmax and PV; here what is dropped is never computed, and
  the scores that decide are integer products for every fourth row.
- Tiles are 16 keys here, 64 or 128 there, and sink and local window are always kept here.

So an imported threshold is a place to begin a calibration, not one.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_sparse_backend.errors import ProfileError, describe
from vllm_sparse_backend.exchange import Imported, Unsupported
from vllm_sparse_backend.profile import Calibration, ModelFacts, Profile
from vllm_sparse_backend.selection import DENSE, Policy, Sale
from vllm_sparse_backend.selection.policy import TAU_CONTEXT

SECTION = "sparse_attention_config"
TARGET = 0.5  # Model Optimizer's own, for checkpoints that do not say
FIELDS = {"config_groups", "threshold_scale_factor", "target_sparsity", "producer"}
OLD_NAMES = {"softmax_skip": "skip_softmax"}  # of algorithms, as `sparse_algo` had them
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,5})(?:\.|$)")
WILD = re.compile(r"[*?\[]")
# What a pattern of `ignore` is tried on, and what it may be about instead.
ATTENTION = [
    f"{model}layers.{{}}.{module}"
    for model in ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
    for module in ("self_attn", "self_attn.attn", "attn", "attention", "self_attention")
]
NO_ATTENTION = ("lm_head", "embed_tokens", "mlp")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Fit(_Part):
    a: float = Field(gt=0)
    b: float


# A number is what the formula comes to, whatever the sparsity.
_Factors = Annotated[_Fit, BeforeValidator(lambda x: {"a": x, "b": 0.0} if _number(x) else x)]


class _Factor(_Part):
    formula: Literal["a * exp(b * target_sparsity)"] = "a * exp(b * target_sparsity)"
    prefill: _Factors
    decode: _Factors | None = None  # decode is dense here


_Share = Annotated[float, Field(ge=0, le=1)]
_Lambda = Annotated[float, Field(gt=0, lt=1)]
_OF_PREFILL = BeforeValidator(lambda x: {"prefill": x} if _number(x) else x)


class _Threshold(_Part):
    prefill: _Lambda
    decode: _Lambda | None = None


class _Target(_Part):
    prefill: _Share = TARGET
    decode: _Share = TARGET


class _SkipSoftmax(_Part):
    algorithm: Literal["skip_softmax"]
    threshold_scale_factor: Annotated[_Factor, _OF_PREFILL] | None = None
    threshold: Annotated[_Threshold, _OF_PREFILL] | None = None
    target_sparsity: _Target | _Share = _Target()
    targets: list[str] = []  # classes of modules; which ones are left out is in `ignore`
    ignore: list[str] = []  # names, or patterns as of fnmatch
    initial_disabled_steps: Literal[0] = 0  # of image generation


def read(data: Any, facts: ModelFacts, name: str, unsupported: Unsupported) -> Imported:
    """The profile in a config.json's contents, or in its section's. Raises ProfileError."""
    groups, beside = _groups(data)
    others = sorted({str(group.get("algorithm")) for group in groups} - {"skip_softmax"})
    if others and unsupported == "error":
        raise ProfileError(
            f"all layers and heads want {', '.join(others)}, for which there is no selector here "
            "yet. Nothing was written; --unsupported dense leaves it out"
        )
    skipping = [group for group in groups if group.get("algorithm") == "skip_softmax"]
    if len(skipping) != 1:
        raise ProfileError(f"want one group of the algorithm skip_softmax, got {len(skipping)}")
    if twice := sorted(skipping[0].keys() & beside.keys()):
        raise ProfileError(
            f"{twice[0]}: want it in the group of skip_softmax or beside config_groups, got both"
        )
    try:
        group = _SkipSoftmax.model_validate({**skipping[0], **beside})
    except ValidationError as error:
        raise ProfileError(f"skip_softmax: {describe(error)}") from None
    found = _found(group)
    dense, without = _dense(group.ignore, facts)
    notes = [
        f"every head sale, tau {found.tau:.3g} {found.what}: a place to begin a calibration, since "
        "theirs compares with a row's maximum and sale with its sum"
    ]
    if dense:
        notes.append(f"dense as in the file: layers {', '.join(map(str, dense))}")
    if without:
        notes.append(f"of no attention, and without effect: {', '.join(without)}")
    if others:
        notes.append(f"left out since there is no selector for it yet: {', '.join(others)}")
    policies: dict[int, dict[int, Policy]] = {
        layer: dict.fromkeys(range(facts.num_heads), DENSE) for layer in dense
    }
    profile = Profile.build(
        facts,
        policies,
        name=name[:200],
        defaults=Sale(tau=found.tau, tau_slope=found.slope),
        calibration=Calibration(note=f"imported from Model Optimizer: {'; '.join(notes)}"),
    )
    return Imported(profile, tuple(notes))


def _groups(data: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups, each with its ``algorithm``, and what stands beside them for skip_softmax."""
    section = data.get(SECTION, data) if isinstance(data, dict) else data
    if isinstance(section, dict) and "config_groups" not in section and _named(section):
        alone = {name: its for name, its in section.items() if name != "producer"}
        return [_renamed(SECTION, alone)], {}
    groups = section.get("config_groups") if isinstance(section, dict) else None
    if not isinstance(groups, dict) or not groups:
        raise ProfileError(f"want {SECTION} with config_groups in it, a config.json's")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise ProfileError(f"config_groups.{name}: want an object, got {type(group).__name__}")
    if strange := sorted(section.keys() - FIELDS):
        raise ProfileError(
            f"{SECTION}.{strange[0][:80]}: not known; want {', '.join(sorted(FIELDS))}"
        )
    beside = {name: its for name, its in section.items() if name in _SkipSoftmax.model_fields}
    return [_renamed(f"config_groups.{name}", group) for name, group in groups.items()], beside


def _named(group: dict[str, Any]) -> bool:
    return "algorithm" in group or "sparse_algo" in group


def _renamed(where: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group with its algorithm under today's name."""
    if "sparse_algo" not in group:
        return group
    if "algorithm" in group:
        raise ProfileError(f"{where}: want algorithm or sparse_algo, got both")
    old = group["sparse_algo"]
    new = OLD_NAMES.get(old, old) if isinstance(old, str) else old
    return {**{name: its for name, its in group.items() if name != "sparse_algo"}, "algorithm": new}


class _Found(NamedTuple):
    tau: float  # at `TAU_CONTEXT` tokens
    slope: float
    what: str


def _found(group: _SkipSoftmax) -> _Found:
    """The threshold of a group, and what it is."""
    factor, threshold = group.threshold_scale_factor, group.threshold
    if factor is not None and threshold is not None:
        raise ProfileError(
            "skip_softmax: want threshold_scale_factor or threshold, got both, and which one holds "
            "is not known"
        )
    if threshold is not None:
        return _Found(threshold.prefill, 0.0, "at any length (skip_softmax, not calibrated)")
    if factor is None:
        raise ProfileError(
            "skip_softmax has no threshold_scale_factor and no threshold: it was not calibrated, "
            "and there is no threshold to import"
        )
    target = group.target_sparsity
    share = target.prefill if isinstance(target, _Target) else target
    tau = _tau(factor.prefill, share)
    of = f"for a sparsity of {share:g}"
    if factor.prefill.b == 0:
        said = "target_sparsity" in group.model_fields_set
        of = f"with a scale factor of {factor.prefill.a:g}" + (f" {of}" if said else "")
    return _Found(tau, -1.0, f"at {TAU_CONTEXT} tokens (skip_softmax {of})")


def _tau(fit: _Fit, share: float) -> float:
    """Lambda at ``TAU_CONTEXT`` tokens."""
    try:
        tau = fit.a * math.exp(fit.b * share) / TAU_CONTEXT
    except OverflowError:
        tau = math.inf
    if not 0 < tau < 1:
        of = f"a = {fit.a:g}, b = {fit.b:g} and a sparsity of {share:g} give"
        if fit.b == 0:
            of = f"a scale factor of {fit.a:g} gives"
        raise ProfileError(
            f"threshold_scale_factor: {of} a threshold of {tau:g} at {TAU_CONTEXT} tokens; want "
            "more than 0 and less than 1"
        )
    return tau


def _dense(ignored: Sequence[str], facts: ModelFacts) -> tuple[list[int], list[str]]:
    """The layers that are left out, and what is of no attention anyway."""
    layers, without = set[int](), []
    for module in ignored:
        its = _matched(module, facts) if WILD.search(module) else _layer(module, facts)
        layers |= its
        if not its:
            without.append(module)
    return sorted(layers), without


def _matched(pattern: str, facts: ModelFacts) -> set[int]:
    """As Model Optimizer's own reader does it, anywhere in a module's name."""
    match = re.compile(fnmatch.translate(f"*{pattern}*")).match
    found = {n for n in range(facts.num_layers) for name in ATTENTION if match(name.format(n))}
    if not found and not any(name in pattern for name in NO_ATTENTION):
        raise ProfileError(
            "ignore: want patterns of attention modules, as in *layers.0.self_attn*, or of "
            f"{', '.join(NO_ATTENTION)}; got {pattern[:80]!r}, which matches none"
        )
    return found


def _layer(module: str, facts: ModelFacts) -> set[int]:
    found = LAYER.search(module)
    exists = found is None or int(found[1]) < facts.num_layers
    rest = module if found is None else module[found.end() :]
    if exists and any(name in rest for name in NO_ATTENTION):
        return set()
    if found is None or not exists:
        raise ProfileError(
            f"ignore: want modules of layers 0 to {facts.num_layers - 1}, as in "
            f"model.layers.0.self_attn, got {module[:80]!r}"
        )
    return {int(found[1])}
