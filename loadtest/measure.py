"""One case of the benchmark: every contender in turn, over and over; medians, ratios, errors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

from contenders import Run, ours_of, pack, sdpa
from inputs import Layer, Plan
from machines import Machine
from pydantic import BaseModel
from rich.console import Console
from truth import Error, Truth

from vllm_sparse_backend.ops.policies import tile_size
from vllm_sparse_backend.selection import AnyPolicy, keeps_all

SDPA = "SDPA"
KEEP_ALL_BUDGET = 0.01  # of an output that only rounding may change
Contender: TypeAlias = list[list[AnyPolicy]]  # by layer and q head, of those that are measured
console = Console(stderr=True)


class Result(BaseModel):
    """One contender. Seconds are medians, weighted sums over the case's calls."""

    name: str
    seconds: float
    pack_seconds: float = 0.0  # these three are of all threads
    select_seconds: float = 0.0
    attend_seconds: float = 0.0
    density: float = 1.0  # computed / causal tiles
    gflops: float  # of the tiles it computes
    peak_share: float  # of what the threads reach in products of the inputs' dtype
    error: Error | None = None  # of ours
    refused: str | None = None  # why no ratio is given
    ratio: dict[str, float] = {}  # a baseline's seconds by ours


class Case(BaseModel):
    """One shape, length and kind of input."""

    shape: str
    input: str
    length: int
    mode: str
    heads: int
    kv_heads: int
    head_dim: int
    heads_of_model: int
    layers: int
    oracle_density: dict[int, float]  # by tile: for 98% of the mass, of sampled q blocks
    results: list[Result]


@dataclass
class Times:
    """One contender's repetitions, each summed over the case's calls."""

    seconds: list[float]
    phases: list[list[float]]  # pack, select, attend
    computed: float = 0.0  # tiles, weighted
    causal: float = 0.0
    errors: list[Error] = field(default_factory=list)


def measure(
    layers: Sequence[Layer],
    plan: Plan,
    contenders: dict[str, Contender],
    machine: Machine,
    *,
    repeats: int,
    with_sdpa: bool,
    budget: float,
    case: dict[str, object],
) -> Case:
    """Time ``contenders`` and the baselines on the plan's steps of every layer.

    ``budget``: the relative L1 beyond which no ratio is reported. ``case``: what is known of it.
    """
    baselines = machine.baselines | ({SDPA: sdpa} if with_sdpa else {})
    times = {
        name: Times([0.0] * repeats, [[0.0] * repeats for _ in range(3)])
        for name in [*contenders, *baselines]
    }
    work, oracle = 0.0, {64: [0.0], 16: [0.0]}
    for number, whole in enumerate(layers):
        for step in plan.steps:
            layer = step.of(whole)
            rows, keys = len(layer.q), len(layer.k)
            console.print(f"  layer {number}, rows {step.start}-{step.end}", highlight=False)
            work += step.weight * (rows * keys - rows * (rows - 1) / 2)
            policies = {name: its[number] for name, its in contenders.items()}
            _time_step(layer, step.weight, policies, baselines, machine, times, repeats)
        truth = Truth(plan.steps[-1].of(whole))
        for tile, densities in oracle.items():
            densities.append(truth.oracle_density(tile))
    shape = layers[0].q.shape
    dtype = str(layers[0].q.dtype).removeprefix("torch.")
    # The compiled core multiplies fp16 as fp32.
    reach = machine.peak_gops.get(dtype, machine.peak_gops["float32"]) * machine.threads
    flops = 4e-9 * shape[1] * shape[2] * work
    results = [_result(name, times[name], flops, reach) for name in times]
    base = {each.name: each.seconds for each in results if each.name in baselines}
    for each in results:
        if each.error is not None:
            exact = all(map(keeps_all, chain.from_iterable(contenders[each.name])))
            allowed = KEEP_ALL_BUDGET if exact else budget
            if not each.error.relative_l1 <= allowed:
                each.refused = f"relative L1 {each.error.relative_l1:.3g} > {allowed:g}"
            elif each.error.needles != each.error.needles_of:
                each.refused = f"{each.error.needles} of {each.error.needles_of} needles"
        if each.refused is None:
            each.ratio = {name: seconds / each.seconds for name, seconds in base.items()}
    return Case.model_validate(
        case
        | {
            "mode": plan.mode,
            "layers": len(layers),
            "oracle_density": {t: sum(d) / len(layers) for t, d in oracle.items()},
            "results": results,
        }
    )


def _time_step(
    layer: Layer,
    weight: float,
    policies: dict[str, list[AnyPolicy]],
    baselines: dict[str, Callable[[Layer], Run]],
    machine: Machine,
    times: dict[str, Times],
    repeats: int,
) -> None:
    there, impl = layer.to(machine.device), machine.impl
    cache = pack(there, impl)
    ours = {name: ours_of(there, policy, cache, impl) for name, policy in policies.items()}
    runs: dict[str, Run] = {**ours, **{name: make(there) for name, make in baselines.items()}}
    if machine.device.type != "cpu":
        for run in runs.values():  # which compiles what is compiled at a first call
            run()
        machine.wait()
    for repeat in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(machine.calls):
                run()
            machine.wait()
            took = (time.perf_counter() - began) / machine.calls
            times[name].seconds[repeat] += weight * took
        for own in ours.values():
            own.account()
    truth = Truth(layer)
    for name, own in ours.items():
        for repeat, stats in enumerate(own.stats):
            phases = (stats.pack_seconds, stats.select_seconds, stats.attend_seconds)
            for phase, seconds in zip(times[name].phases, phases, strict=True):
                phase[repeat] += weight * seconds
        sizes = map(tile_size, policies[name])
        counts = zip(own.stats[0].tiles_computed, own.stats[0].tiles_causal, strict=True)
        for tile, (computed, causal) in zip(sizes, counts, strict=True):
            times[name].computed += weight * tile * computed
            times[name].causal += weight * tile * causal
        tiles = None if all(map(keeps_all, policies[name])) else own.tiles()
        times[name].errors.append(truth.judge(own().cpu(), tiles))


def _result(name: str, times: Times, flops: float, reach: float) -> Result:
    seconds = statistics.median(times.seconds)
    pack_seconds, select_seconds, attend_seconds = map(statistics.median, times.phases)
    density = times.computed / times.causal if times.causal else 1.0
    return Result(
        name=name,
        seconds=seconds,
        pack_seconds=pack_seconds,
        select_seconds=select_seconds,
        attend_seconds=attend_seconds,
        density=density,
        gflops=density * flops / seconds,
        peak_share=density * flops / seconds / reach,
        error=_together(times.errors) if times.errors else None,
    )


def _together(errors: list[Error]) -> Error:
    """Of several calls: means, and needles in all."""
    fields = ("relative_l1", "worst_rows", "recall", "worst_recall")
    planted = [e for e in errors if e.needles is not None]
    return Error(
        **{name: statistics.fmean(getattr(e, name) for e in errors) for name in fields},
        needles=sum(e.needles or 0 for e in planted) if planted else None,
        needles_of=sum(e.needles_of or 0 for e in planted) if planted else None,
    )
