"""The cost model: what is decided by it, and that it orders what it must."""

from __future__ import annotations

import pytest

from vllm_sparse_backend.ops.cpu import build, cost
from vllm_sparse_backend.selection import DENSE, UNIFORM_DEFAULT, AnyPolicy, Mass, Sale, Static

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


@pytest.mark.parametrize("policy", [DENSE, Sale(tau=0), Static(local=256)])
def test_choosing_costs_nothing_where_nothing_is_scored(policy: AnyPolicy) -> None:
    assert cost.selection_seconds("avx2", policy, 8192, 8192, 9, 64) == 0


@pytest.mark.parametrize("isa", ISAS)
def test_what_selection_costs_follows_from_what_is_scored(isa: str) -> None:
    def seconds(policy: AnyPolicy, rows: int = 8192, context: int = 8192, heads: int = 4) -> float:
        return cost.selection_seconds(isa, policy, rows, context, heads, 64)

    policy = Mass()
    assert seconds(policy, 256, 256) == 0  # within sink and window
    assert seconds(policy, heads=8) == pytest.approx(2 * seconds(policy))
    assert seconds(policy, 64, 8192) < seconds(policy, 64, 16384)
    for less, more in (
        (Mass(row_stride=4), Mass(row_stride=2)),
        (Mass(bits=6), Mass(bits=8)),
        (Mass(tail=0), Mass(tail=128)),
        (Mass(local=512), Mass(local=256)),
    ):
        assert seconds(less) <= seconds(more)
        assert seconds(less) < seconds(more) or less.bits != more.bits
    # In steps, as a prompt is really read: the same blocks, and one tail where that is known.
    untailed = Mass(tail=0)
    steps = sum(seconds(untailed, 2048, end) for end in range(2048, 8193, 2048))
    assert steps == pytest.approx(seconds(untailed))
    assert sum(seconds(policy, 2048, end) for end in range(2048, 8193, 2048)) > seconds(policy)
    known = sum(
        cost.selection_seconds(isa, policy, 2048, end, 4, 64, 8192)
        for end in range(2048, 8193, 2048)
    )
    assert known == pytest.approx(seconds(policy))


def test_selection_at_a_length_worked_out_by_hand() -> None:
    # The q block at 960 of one head, 16 of its 64 rows against the 640 keys beyond the window.
    policy = Sale(sink=64, local=256, row_stride=4, tail=0, bits=6)
    rates = cost.RATES["avx2"]
    by_hand = 2 * 64 * 16 * 640 / rates.score * 1e-9 + rates.block_seconds
    assert cost.selection_seconds("avx2", policy, 64, 1024, 1, 64) == pytest.approx(by_hand)


@pytest.mark.parametrize("isa", ISAS)
def test_a_sparse_head_costs_its_selection_and_its_share_of_the_attention(isa: str) -> None:
    call = cost.RATES[isa].call_seconds
    keep_all = cost.attend_seconds(isa, 4096, 8192, 8, 64) - call
    assert cost.sparse_seconds(isa, DENSE, 4096, 8192, 8, 64, 1.0) == pytest.approx(keep_all)
    policy = UNIFORM_DEFAULT
    selection = cost.selection_seconds(isa, policy, 4096, 8192, 8, 64)
    assert selection > 0
    quarter = cost.sparse_seconds(isa, policy, 4096, 8192, 8, 64, 0.25)
    assert quarter == pytest.approx(0.25 * keep_all + selection)


@pytest.mark.parametrize("isa", ISAS)
def test_the_costs_of_a_last_q_block_agree_with_when_a_policy_pays(isa: str) -> None:
    for policy in (Mass(tail=0), Sale(tail=0, row_stride=8), Mass(tail=0, bits=8, row_stride=8)):
        least = cost.sparse_wins_from(isa, policy, 128)
        assert least is not None
        for tokens, pays in ((2 * least, True), (least // 2, False)):
            context = tokens // 64 * 64
            window = min(context, policy.sink + policy.local + 64)
            kept = (window + cost.EXPECTED_KEPT * (context - window)) / context
            sparse = cost.sparse_seconds(isa, policy, 64, context, 1, 128, kept)
            keep_all = cost.sparse_seconds(isa, DENSE, 64, context, 1, 128, 1.0)
            assert (sparse < keep_all) is pays


def test_matrix_products_have_a_rate_for_every_dtype_that_is_served() -> None:
    for isa, dtype in cost.MATMUL_MEASURED:
        assert dtype in cost.RATES[isa].matmul
    for rates in cost.RATES.values():
        assert set(rates.matmul) == {"float32", "bfloat16", "float16"}
    assert cost.matmul_seconds("avx2", "float32", 1000, 72e6) == pytest.approx(2.0)
