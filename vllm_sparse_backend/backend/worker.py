"""What a worker process holds for all layers of its model: the setup and the counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_sparse_backend import compat
from vllm_sparse_backend.backend.plan import DenseReason, Plan
from vllm_sparse_backend.backend.start import Setup, resolve
from vllm_sparse_backend.errors import ProfileMismatch
from vllm_sparse_backend.metrics import Counters, counters, open_session
from vllm_sparse_backend.metrics.prometheus import mirror_if_needed
from vllm_sparse_backend.ops import AttentionStats, PolicyTable
from vllm_sparse_backend.ops.cpu import cost
from vllm_sparse_backend.ops.tiles import SUBTILE
from vllm_sparse_backend.profile import local_heads
from vllm_sparse_backend.selection import AnyPolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Worker:
    """One engine's share of a worker process."""

    def __init__(self, setup: Setup, tp_rank: int) -> None:
        self.setup = setup
        self.tp_rank = tp_rank
        info = setup.labels()
        self.counters = Counters(open_session(), list(DenseReason), info, mirror_if_needed(info))
        # Ranks that share a layer's heads see the same tokens, but each its own tiles.
        self._counts_tokens = tp_rank == 0

    def policies(self, layer_name: str, num_heads: int, head_dim: int) -> PolicyTable:
        """The policies of a layer's ``num_heads`` q heads on this rank.

        Raises SparsePrefillError where the profile cannot be applied to the layer.
        """
        policies = self._policies(layer_name, num_heads)
        if not self.setup.on_cpu:
            # There is no cost model of GPUs, for want of measurements: a policy is followed as soon
            # as a request is sparse, that is from min_prompt_tokens on.
            return PolicyTable(policies)
        # A head's policy costs more than keeping all while little lies beyond its window.
        never = 2**31 - 1
        least = self.setup.config.min_prompt_tokens
        wins = [cost.sparse_wins_from(self.setup.isa, policy, head_dim) for policy in policies]
        return PolicyTable(
            policies, [never if tokens is None else max(least, tokens) for tokens in wins]
        )

    def _policies(self, layer_name: str, num_heads: int) -> list[AnyPolicy]:
        profile = self.setup.profile
        if profile is None:
            return [self.setup.uniform] * num_heads
        layer = compat.layer_index(layer_name)
        try:
            return local_heads(profile.for_layer(layer), self.tp_rank, num_heads)
        except ValueError as error:
            raise ProfileMismatch(
                f"profile {profile.name!r} does not fit layer {layer_name}: {error}"
            ) from None

    def core_from(self, num_heads: int, head_dim: int, kv_layout: str) -> int | None:
        """The context from which on the core computes prompts that are not sparse; None: never."""
        # With the amx layout CPU_ATTN multiplies by tiles, which the core does not: nobody has
        # compared the two yet.
        config = self.setup.config
        if not (config.enabled and config.dense_core) or kv_layout == "amx":
            return None
        return cost.core_wins_from(self.setup.isa, num_heads, head_dim)

    def count_dense(self, reason: DenseReason, layer_tokens: int) -> None:
        """Tokens times layers that the base backend computes."""
        if self._counts_tokens:
            self.counters.add(counters.dense(reason), layer_tokens)

    def count_plan(self, plan: Plan, layers: int = 1) -> None:
        """The tokens of a step, in layers that follow its plan."""
        if not self._counts_tokens:
            return
        if plan.sparse_tokens:
            self.counters.add(counters.SPARSE, plan.sparse_tokens * layers)
        if plan.kept_tokens:
            self.counters.add(counters.KEPT, plan.kept_tokens * layers)
        for reason, tokens in plan.dense_tokens.items():
            self.counters.add(counters.dense(reason), tokens * layers)

    def count_stats(self, stats: AttentionStats, policies: PolicyTable) -> None:
        """What one call of the op computed; tiles in units of `SUBTILE` keys."""
        self.count_computed(_in_subtiles(stats.tiles_computed, policies))
        self.count_causal(stats.tiles_causal, policies)
        self.counters.add(counters.SELECT, stats.pack_seconds + stats.select_seconds)
        self.counters.add(counters.ATTEND, stats.attend_seconds)

    def count_causal(self, tiles: Sequence[int], policies: PolicyTable) -> None:
        """What there was to compute: tiles per q head, each in the head's own size."""
        self.counters.add(counters.CAUSAL, _in_subtiles(tiles, policies))

    def count_computed(self, tiles: int) -> None:
        """Tiles that were computed, in units of `SUBTILE` keys."""
        self.counters.add(counters.COMPUTED, tiles)


def subtiles_of(policies: PolicyTable) -> list[int]:
    """How many units of `SUBTILE` keys a tile of each q head is.

    Heads may differ in tile size: without these weights the coarse ones would hardly count.
    """
    return [size // SUBTILE for size in policies.tile_sizes]


def _in_subtiles(tiles: Sequence[int], policies: PolicyTable) -> int:
    return sum(t * w for t, w in zip(tiles, subtiles_of(policies), strict=True))


_workers: dict[str, Worker] = {}  # a process may have several engines, one after the other


def worker_of(vllm_config: VllmConfig) -> Worker:
    """This process's worker of the engine with this configuration."""
    key = vllm_config.instance_id
    if key not in _workers:
        _workers[key] = Worker(resolve(vllm_config), compat.tp_rank())
    return _workers[key]
