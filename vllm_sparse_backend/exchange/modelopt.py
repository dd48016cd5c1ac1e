"""NVIDIA Model Optimizer's skip-softmax calibration, from a checkpoint's ``config.json``.

``sparse_attention_config.config_groups`` holds groups; that of the algorithm ``skip_softmax`` has
``threshold_scale_factor.prefill`` with ``a`` and ``b``, ``target_sparsity.prefill`` (S, 0.5 where
it is not given) and ``ignore``, the modules that stay dense. At a length of L tokens, one threshold
for all heads: ``lambda = a * exp(b * S) / L``.

The nearest of ours is ``sale`` with ``tau = lambda``, for all heads, falling with the length as
theirs does (``tau_slope = -1``). The two are not the same:

- Theirs drops a tile whose scores all stay below the row's *maximum* so far by ``ln(lambda)``;
  SALE's rule compares with the *sum* over sink and local window, which is at least as large. The
  same number drops more here, by as much as a row's mass is spread.
- Theirs computes all of QK and saves softmax and PV; here what is dropped is never computed, and
  the scores that decide are integer products for every fourth row.
- Tiles are 16 keys here, 64 or 128 there, and sink and local window are always kept here.

So an imported threshold is a place to begin a calibration, not one.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_sparse_backend.errors import ProfileError, describe
from vllm_sparse_backend.exchange import Imported, Unsupported
from vllm_sparse_backend.profile import Calibration, ModelFacts, Profile
from vllm_sparse_backend.selection import DENSE, Policy, Sale
from vllm_sparse_backend.selection.policy import TAU_CONTEXT

SECTION = "sparse_attention_config"
TARGET = 0.5  # Model Optimizer's own, for checkpoints that do not say
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,5})(?:\.|$)")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Fit(_Part):
    a: float = Field(gt=0)
    b: float


class _Factor(_Part):
    formula: Literal["a * exp(b * target_sparsity)"] = "a * exp(b * target_sparsity)"
    prefill: _Fit
    decode: _Fit | None = None  # decode is dense here


_Share = Annotated[float, Field(ge=0, le=1)]


class _Target(_Part):
    prefill: _Share = TARGET
    decode: _Share = TARGET


class _SkipSoftmax(_Part):
    algorithm: Literal["skip_softmax"]
    threshold_scale_factor: _Factor
    target_sparsity: _Target | _Share = _Target()
    targets: list[str] = []  # classes of modules; which ones are left out is in `ignore`
    ignore: list[str] = []
    initial_disabled_steps: Literal[0] = 0  # of image generation


def read(data: Any, facts: ModelFacts, name: str, unsupported: Unsupported) -> Imported:
    """The profile in a config.json's contents, or in its section's. Raises ProfileError."""
    groups = _groups(data)
    others = sorted({str(group.get("algorithm")) for group in groups} - {"skip_softmax"})
    if others and unsupported == "error":
        raise ProfileError(
            f"all layers and heads want {', '.join(others)}, for which there is no selector here "
            "yet. Nothing was written; --unsupported dense leaves it out"
        )
    skipping = [group for group in groups if group.get("algorithm") == "skip_softmax"]
    if len(skipping) != 1:
        raise ProfileError(f"want one group of the algorithm skip_softmax, got {len(skipping)}")
    if "threshold_scale_factor" not in skipping[0]:
        raise ProfileError(
            "skip_softmax has no threshold_scale_factor: it was not calibrated, and there is no "
            "threshold to import"
        )
    try:
        group = _SkipSoftmax.model_validate(skipping[0])
    except ValidationError as error:
        raise ProfileError(f"skip_softmax: {describe(error)}") from None
    target = group.target_sparsity
    share = target.prefill if isinstance(target, _Target) else target
    tau = _tau(group.threshold_scale_factor.prefill, share)
    dense = sorted({_layer(module, facts) for module in group.ignore})
    notes = [
        f"every head sale, tau {tau:.3g} at {TAU_CONTEXT} tokens (skip_softmax for a sparsity of "
        f"{share:g}): a place to begin a calibration, since theirs compares with a row's maximum "
        "and sale with its sum"
    ]
    if dense:
        notes.append(f"dense as in the file: layers {', '.join(map(str, dense))}")
    if others:
        notes.append(f"left out since there is no selector for it yet: {', '.join(others)}")
    policies: dict[int, dict[int, Policy]] = {
        layer: dict.fromkeys(range(facts.num_heads), DENSE) for layer in dense
    }
    profile = Profile.build(
        facts,
        policies,
        name=name[:200],
        defaults=Sale(tau=tau, tau_slope=-1.0),
        calibration=Calibration(note=f"imported from Model Optimizer: {'; '.join(notes)}"),
    )
    return Imported(profile, tuple(notes))


def _groups(data: Any) -> list[dict[str, Any]]:
    section = data.get(SECTION, data) if isinstance(data, dict) else data
    groups = section.get("config_groups") if isinstance(section, dict) else None
    if not isinstance(groups, dict) or not groups:
        raise ProfileError(f"want {SECTION} with config_groups in it, a config.json's")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise ProfileError(f"config_groups.{name}: want an object, got {type(group).__name__}")
    return list(groups.values())


def _tau(fit: _Fit, share: float) -> float:
    """Lambda at ``TAU_CONTEXT`` tokens."""
    try:
        tau = fit.a * math.exp(fit.b * share) / TAU_CONTEXT
    except OverflowError:
        tau = math.inf
    if not 0 < tau < 1:
        raise ProfileError(
            f"a = {fit.a:g}, b = {fit.b:g} and a sparsity of {share:g} give a threshold of {tau:g} "
            f"at {TAU_CONTEXT} tokens; want more than 0 and less than 1"
        )
    return tau


def _layer(module: str, facts: ModelFacts) -> int:
    found = LAYER.search(module)
    if found is None or int(found[1]) >= facts.num_layers:
        raise ProfileError(
            f"ignore: want modules of layers 0 to {facts.num_layers - 1}, as in "
            f"model.layers.0.self_attn, got {module[:80]!r}"
        )
    return int(found[1])
