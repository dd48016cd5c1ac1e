"""What a worker process holds for all layers of its model: the setup and the counters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_sparse_backend import compat
from vllm_sparse_backend.backend.plan import DenseReason, Plan
from vllm_sparse_backend.backend.start import Setup, resolve
from vllm_sparse_backend.errors import ProfileMismatch, SparsePrefillError
from vllm_sparse_backend.metrics import Counters, counters, open_session
from vllm_sparse_backend.metrics.prometheus import mirror_if_needed
from vllm_sparse_backend.ops import AttentionStats, PolicyTable
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.ops.listed import rehearse
from vllm_sparse_backend.ops.policies import Place
from vllm_sparse_backend.ops.tiles import SUBTILE, total_causal_tiles
from vllm_sparse_backend.profile import local_heads
from vllm_sparse_backend.selection import AnyPolicy, ListSelector, scaled

COMPUTED, CAUSAL = range(2)  # kinds of tiles, as `counters.KINDS`
TILES = (counters.COMPUTED, counters.CAUSAL)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCALES = 16  # tables that a layer keeps


class Worker:
    """One engine's share of a worker process."""

    def __init__(self, setup: Setup, tp_rank: int) -> None:
        self.setup = setup
        self.tp_rank = tp_rank
        info, expected = setup.labels(), setup.expected_density()
        self.counters = Counters(
            open_session(),
            list(DenseReason),
            info,
            mirror_if_needed(info, expected),
            shape=setup.shape,
            expected=expected,
        )
        self._cells: dict[str, npt.NDArray[np.int64] | None] = {}
        rates = cost.RATES.get(setup.isa)  # there are none of GPUs
        self._core_over_base = rates.attend / rates.base if rates else 0.0
        # Ranks that share a layer's heads see the same tokens, but each its own tiles.
        self._counts_tokens = tp_rank == 0

    def tables(
        self, layer_name: str, num_heads: int, head_dim: int
    ) -> Callable[[float], PolicyTable]:
        """`policies` by threshold scale, made once for each of the scales that are in use.

        Raises SparsePrefillError where the profile cannot be applied to the layer, or where a list
        selector does not do what one owes.
        """
        make = partial(self.policies, layer_name, num_heads, head_dim)
        tables = lru_cache(maxsize=SCALES)(make)  # bounded: clients choose the scales
        table = tables(1.0)
        if self.setup.on_cpu:  # on GPUs the builder does, which knows the device
            rehearse(table, head_dim)
        return tables

    def policies(
        self, layer_name: str, num_heads: int, head_dim: int, threshold_scale: float = 1.0
    ) -> PolicyTable:
        """The policies of a layer's ``num_heads`` q heads on this rank, their thresholds
        multiplied by ``threshold_scale``.

        Raises SparsePrefillError where the profile cannot be applied to the layer.
        """
        policies = policies_of(self.setup, self.tp_rank, layer_name, num_heads)
        if threshold_scale != 1:
            policies = [scaled(policy, threshold_scale) or policy for policy in policies]
        place = place_of(self.setup, self.tp_rank, layer_name, num_heads)
        self._cells[layer_name] = self._cells_of(place, num_heads)
        if not self.setup.on_cpu:
            # No cost model decides on GPUs, where nothing was measured: a policy is followed as
            # soon as a request is sparse, that is from min_prompt_tokens on.
            return PolicyTable(policies, place=place)
        least = self.setup.config.min_prompt_tokens
        followed_from = [
            cost.followed_from(self.setup.isa, policy, head_dim, least) for policy in policies
        ]
        return PolicyTable(policies, followed_from, place)

    def core_from(self, num_heads: int, head_dim: int, kv_layout: str) -> int | None:
        """The context from which on the core computes prompts that are not sparse; None: never."""
        # With the amx layout CPU_ATTN multiplies by tiles, which the core does not: nobody has
        # compared the two yet.
        config = self.setup.config
        if not (config.enabled and config.dense_core) or kv_layout == "amx":
            return None
        return cost.core_wins_from(self.setup.isa, num_heads, head_dim)

    def count_dense(self, reason: DenseReason, layer_tokens: int, layer_requests: int) -> None:
        """Tokens times layers that the base backend computes, and requests times layers."""
        self._count_path(counters.dense(reason), layer_tokens, layer_requests)

    def count_plan(self, plan: Plan, layers: int = 1) -> None:
        """The tokens of a step, in layers that follow its plan."""
        self._count_path(
            counters.SPARSE, plan.sparse_tokens * layers, plan.sparse_requests * layers
        )
        self._count_path(counters.KEPT, plan.kept_tokens * layers, len(plan.kept) * layers)
        for reason, tokens in plan.dense_tokens.items():
            self.count_dense(reason, tokens * layers, plan.dense_requests[reason] * layers)

    def count_stats(
        self,
        layer_name: str,
        stats: AttentionStats,
        policies: PolicyTable,
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        """What one call of the op computed in a layer.

        ``kept``: rows and context of those of its requests that keep every tile. They are no part
        of what is counted by head, where they would hide what policies do.
        """
        sizes = policies.tile_sizes
        weights = np.array(subtiles_of(policies))
        computed = np.array(stats.tiles_computed) * weights
        causal = np.array(stats.tiles_causal) * weights
        by_size = {
            size: sum(total_causal_tiles(*request, size) for request in kept)
            for size in (set(sizes) if kept else ())
        }
        of_kept = np.array([by_size[size] for size in sizes]) * weights if kept else 0
        self._count_tiles(layer_name, COMPUTED, computed, computed - of_kept)
        self._count_tiles(layer_name, CAUSAL, causal, causal - of_kept)
        self.counters.add(counters.SELECT, stats.pack_seconds + stats.select_seconds)
        self.counters.add(counters.ATTEND, stats.attend_seconds)
        if total := int(computed.sum()):
            whole = stats.attend_seconds * int(causal.sum()) / total
            self.counters.add(counters.DENSE_ESTIMATE, whole * self._core_over_base)

    def count_causal(self, layer_name: str, tiles: Sequence[int], policies: PolicyTable) -> None:
        """What there was to compute: tiles per q head, each in the head's own size."""
        causal = np.array(tiles) * np.array(subtiles_of(policies))
        self._count_tiles(layer_name, CAUSAL, causal, causal)

    def count_computed(self, layer_name: str, tiles: npt.NDArray[np.int64]) -> None:
        """Tiles of each head that were computed, in units of `SUBTILE` keys."""
        self._count_tiles(layer_name, COMPUTED, tiles, tiles)

    def _count_path(self, tokens: counters.Key, layer_tokens: int, layer_requests: int) -> None:
        if self._counts_tokens and layer_tokens:
            self.counters.add(tokens, layer_tokens)
            self.counters.add(counters.decisions(tokens), layer_requests)

    def _count_tiles(
        self,
        layer_name: str,
        kind: int,
        of_all: npt.NDArray[np.int64],
        of_sparse: npt.NDArray[np.int64],
    ) -> None:
        self.counters.add(TILES[kind], int(of_all.sum()))
        if (cells := self._cells[layer_name]) is not None:
            self.counters.add_tiles(kind, cells, of_sparse)

    def _cells_of(self, place: Place, num_heads: int) -> npt.NDArray[np.int64] | None:
        """Where a layer's heads are among those of the whole model; None: nowhere."""
        layers, heads = self.setup.shape
        if place.layer is None or place.layer >= layers or place.first_head + num_heads > heads:
            return None
        return place.layer * heads + place.first_head + np.arange(num_heads)


def policies_of(setup: Setup, tp_rank: int, layer_name: str, num_heads: int) -> list[AnyPolicy]:
    """The policies of a layer's ``num_heads`` q heads on one rank.

    Raises SparsePrefillError where the profile cannot be applied to the layer.
    """
    profile = setup.profile
    if profile is None:
        return [setup.uniform] * num_heads
    layer = compat.layer_index(layer_name)
    try:
        return local_heads(profile.for_layer(layer), tp_rank, num_heads)
    except ValueError as error:
        raise ProfileMismatch(
            f"profile {profile.name!r} does not fit layer {layer_name}: {error}"
        ) from None


def place_of(setup: Setup, tp_rank: int, layer_name: str, num_heads: int) -> Place:
    """Where a layer's heads on one rank are in the model."""
    first = tp_rank * num_heads
    try:
        layer = compat.layer_index(layer_name)
    except SparsePrefillError:  # a name without a number, which only a profile needs
        layer = None
    return Place(layer, first, max(setup.shape[1], first + num_heads))


def subtiles_of(policies: PolicyTable) -> list[int]:
    """How many units of `SUBTILE` keys a tile of each q head is.

    Heads may differ in tile size: without these weights the coarse ones would hardly count.
    """
    return [size // SUBTILE for size in policies.tile_sizes]


# A process may have several engines, one after the other.
_setups: dict[str, Setup] = {}
_workers: dict[str, Worker] = {}


def listed_of(vllm_config: VllmConfig, layer_name: str, num_heads: int) -> PolicyTable | None:
    """A layer's policies on this rank, if some of the engine's are list selectors; None else.

    For who asks before there is a `worker_of`, and not of other ranks. Raises SparsePrefillError.
    """
    setup = _setup_of(vllm_config)
    policies = {setup.uniform} if setup.profile is None else setup.profile.kinds()
    if not (setup.config.enabled and any(isinstance(it, ListSelector) for it in policies)):
        return None
    its = setup, compat.tp_rank(), layer_name, num_heads
    return PolicyTable(policies_of(*its), place=place_of(*its))


def _setup_of(vllm_config: VllmConfig) -> Setup:
    key = vllm_config.instance_id
    if key not in _setups:
        _setups[key] = resolve(vllm_config)
    return _setups[key]


def worker_of(vllm_config: VllmConfig) -> Worker:
    """This process's worker of the engine with this configuration."""
    key = vllm_config.instance_id
    if key not in _workers:
        setup = _setup_of(vllm_config)
        expect_common(vllm_config, setup)
        _workers[key] = Worker(setup, compat.tp_rank())
    return _workers[key]


def expect_common(vllm_config: VllmConfig, setup: Setup) -> None:
    """Raise ProfileMismatch if another rank of this server runs with something else.

    On several nodes each may have been configured by its own command line, environment and files.
    """
    mine = setup.common()
    first = json.loads(compat.first_said(vllm_config, json.dumps(mine)))
    wrong = [
        f"{name}: {first.get(name)} on another rank, {value} on this one"
        for name, value in mine.items()
        if first.get(name) != value
    ]
    if wrong:
        raise ProfileMismatch(f"want the same on all ranks of a server, got {'; '.join(wrong)}")
