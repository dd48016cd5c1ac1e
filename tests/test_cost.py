"""The cost model: what is decided by it, and that it orders what it must."""

from __future__ import annotations

import pytest

from vllm_sparse_backend.ops.cpu import build, cost
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, Mass, Sale, Static

ISAS = [isa.name for isa in build.instruction_sets()]


def test_every_instruction_set_has_rates() -> None:
    assert set(cost.RATES) == set(ISAS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (32, 128), (4, 256), (1, 64)])
def test_the_core_wins_from_where_its_prediction_is_the_lower(
    isa: str, heads: int, head_dim: int
) -> None:
    least = cost.core_wins_from(isa, heads, head_dim)
    assert least % 64 == 0

    def wins(tokens: int) -> bool:
        ours, base = (
            seconds(isa, tokens, tokens, heads, head_dim)
            for seconds in (cost.attend_seconds, cost.base_seconds)
        )
        return ours <= base

    assert wins(least)
    assert wins(10 * least)
    assert least == 64 or not wins(least - 64)


@pytest.mark.parametrize("isa", ISAS)
def test_when_a_policy_pays(isa: str) -> None:
    assert cost.sparse_wins_from(isa, DENSE, 64) is None
    assert cost.sparse_wins_from(isa, Sale(tau=0), 64) is None
    assert cost.sparse_wins_from(isa, Static(local=1000, sink=64), 64) == 1128
    default = cost.sparse_wins_from(isa, UNIFORM_DEFAULT, 64)
    assert default is not None
    assert 384 < default < 2048
    for fewer, more in ((Mass(row_stride=4), Mass(row_stride=2)), (Mass(local=64), Mass())):
        low, high = (cost.sparse_wins_from(isa, policy, 128) for policy in (fewer, more))
        assert low is not None
        assert high is None or low < high
