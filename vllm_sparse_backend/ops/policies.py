"""One layer's policies, parsed once and then handed to every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from vllm_sparse_backend.selection import (
    UNIFORM_DEFAULT,
    AnyPolicy,
    Dense,
    ListSelector,
    Sale,
    Tile,
    parse_policy,
)

DENSE_TILE: Final = 16  # what a dense head's tiles are counted in

OnePolicy: TypeAlias = AnyPolicy | Mapping[str, Any]
AnyPolicies: TypeAlias = "PolicyTable | OnePolicy | Sequence[OnePolicy] | None"


def tile_size(policy: AnyPolicy) -> Tile:
    """Key tokens per tile under this policy."""
    return DENSE_TILE if isinstance(policy, Dense) else policy.tile


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table's heads are in the model, for selectors that go by that."""

    layer: int | None  # None: in no model
    first_head: int  # of the table's heads, among the layer's of all ranks
    num_heads: int  # of the layer, over all ranks


NEVER = 2**31 - 1  # tokens: no context is longer, and kernels hold them in 32 bits


class PolicyTable:
    """A policy for each q head of a layer, and from which context on it is followed.

    ``dense_below``: a request with fewer tokens of context is computed with every tile kept; one
    number per q head, none by default. ``place``: the heads are all there are of a layer without a
    number, unless given. Compares and hashes by identity.
    """

    __slots__ = ("dense_below", "device_rows", "has_listed", "native", "place", "rows")

    def __init__(
        self,
        rows: Sequence[AnyPolicy],
        dense_below: Sequence[int] | None = None,
        place: Place | None = None,
    ) -> None:
        self.rows = list(rows)  # one per q head
        self.has_listed = any(isinstance(policy, ListSelector) for policy in self.rows)
        self.place = place or Place(None, 0, len(self.rows))
        self.dense_below = [min(n, NEVER) for n in dense_below or [0] * len(self.rows)]
        if len(self.dense_below) != len(self.rows):
            raise ValueError(
                f"dense_below: want one for each of {len(self.rows)} q heads, "
                f"got {len(self.dense_below)}"
            )
        # What the kernels made of the rows, for their next call: the compiled core, and the GPU's
        # by device.
        self.native: object | None = None
        self.device_rows: dict[object, object] = {}

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Key tokens per tile of each q head."""
        return tuple(tile_size(policy) for policy in self.rows)

    def followed(self, seq_len: int) -> list[AnyPolicy]:
        """What each head does for a request with so many tokens of context.

        Where a policy is not followed yet, one that keeps everything stands for it, with the
        same tiles.
        """
        return [
            policy if seq_len >= least else Sale(tau=0, tile=tile_size(policy))
            for policy, least in zip(self.rows, self.dense_below, strict=True)
        ]

    def listed(self, seq_len: int) -> list[int]:
        """The heads whose tiles list selectors choose, of a request with so much context."""
        return [
            head
            for head, (policy, least) in enumerate(zip(self.rows, self.dense_below, strict=True))
            if isinstance(policy, ListSelector) and seq_len >= least
        ]

    @classmethod
    def build(cls, policies: AnyPolicies, num_heads: int) -> PolicyTable:
        """A table for ``num_heads`` q heads from what a caller may write.

        ``policies`` is None (the uniform default), one policy (an object or its dict) for
        all heads, a sequence of one per head, or a table, which is returned as it is. Raises
        ValueError for a policy that does not parse and for a wrong number of them.
        """
        if isinstance(policies, PolicyTable):
            table = policies
        elif policies is None or isinstance(policies, AnyPolicy | Mapping):
            policy = UNIFORM_DEFAULT if policies is None else _parse("policies", policies)
            table = cls([policy] * num_heads)
        else:
            table = cls([_parse(f"policies[{i}]", policy) for i, policy in enumerate(policies)])
        if len(table.rows) != num_heads:
            raise ValueError(
                f"policies: want one for each of {num_heads} q heads, got {len(table.rows)}"
            )
        return table


def _parse(name: str, policy: OnePolicy) -> AnyPolicy:
    try:
        return parse_policy(dict(policy) if isinstance(policy, Mapping) else policy)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
