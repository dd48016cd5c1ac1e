"""What a call of the ops computed, and how long that took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionStats:
    """What one call computed, summed over its requests."""

    tiles_computed: list[int]  # per q head, in the head's own tile size (dense: 16 keys)
    tiles_causal: list[int]  # per q head: what there was to compute
    pack_seconds: float  # of what is done once per call for all q blocks; summed over threads
    select_seconds: float  # summed over threads
    attend_seconds: float  # summed over threads

    @property
    def density(self) -> list[float]:
        """Computed / causal tiles per q head; 1 where there were none."""
        pairs = zip(self.tiles_computed, self.tiles_causal, strict=True)
        return [computed / causal if causal else 1.0 for computed, causal in pairs]


def total(parts: Sequence[AttentionStats], num_heads: int) -> AttentionStats:
    """The sum of what several calls computed, which may be none."""
    return AttentionStats(
        [sum(part.tiles_computed[head] for part in parts) for head in range(num_heads)],
        [sum(part.tiles_causal[head] for part in parts) for head in range(num_heads)],
        sum(part.pack_seconds for part in parts),
        sum(part.select_seconds for part in parts),
        sum(part.attend_seconds for part in parts),
    )
