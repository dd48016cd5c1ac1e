"""Who goes where: every request and every layer, each reason reached."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from vllm_sparse_backend.backend.plan import (
    REQUEST_REASONS,
    Capabilities,
    DenseReason,
    LayerTraits,
    Plan,
    Run,
    make_plan,
    why_dense,
)
from vllm_sparse_backend.control import DEFAULT, Setting

CORE = Capabilities(head_dims=(64, 128), dtypes=("bfloat16", "float32"), kv_layouts=("vec", "amx"))
PLAIN = LayerTraits(head_dim=64, dtype="bfloat16")
FLAGS = {
    "sliding_window": DenseReason.SLIDING_WINDOW,
    "sinks": DenseReason.SINKS,
    "softcap": DenseReason.SOFTCAP,
    "alibi": DenseReason.ALIBI,
    "kv_sharing": DenseReason.KV_SHARING,
    "draft": DenseReason.DRAFT,
    "context_parallel": DenseReason.CONTEXT_PARALLEL,
    "quantized_kv": DenseReason.QUANTIZED_KV,
}
KINDS = (
    DenseReason.MLA,
    DenseReason.ENCODER,
    DenseReason.CROSS_ATTENTION,
    DenseReason.NON_CAUSAL,
    DenseReason.MULTIMODAL_PREFIX,
    DenseReason.CHUNKED_ATTENTION,
    DenseReason.OTHER_ATTENTION,
)
CANNOT: tuple[tuple[dict[str, Any], DenseReason], ...] = (
    ({"kv_layout": "neon"}, DenseReason.KV_LAYOUT),
    ({"dtype": "float16"}, DenseReason.DTYPE),
    ({"head_dim": 72}, DenseReason.HEAD_DIM),
)


def test_a_plain_layer_can_be_sparse() -> None:
    options: tuple[dict[str, Any], ...] = (
        {},
        {"kv_layout": "vec"},
        {"kv_layout": "amx"},
        {"head_dim": 128},
    )
    for changes in options:
        assert why_dense(dataclasses.replace(PLAIN, **changes), CORE) is None


def test_every_reason_is_reached_by_what_it_names() -> None:
    changes: list[tuple[dict[str, Any], DenseReason]] = [
        *[({name: True}, reason) for name, reason in FLAGS.items()],
        *[({"kind": kind}, kind) for kind in KINDS],
        *CANNOT,
    ]
    for change, reason in changes:
        assert why_dense(dataclasses.replace(PLAIN, **change), CORE) is reason
        # Switched off is said of every layer, whatever else may be said of it.
        off = why_dense(dataclasses.replace(PLAIN, **change), CORE, enabled=False)
        assert off is DenseReason.SWITCHED_OFF
    assert why_dense(PLAIN, CORE, enabled=False) is DenseReason.SWITCHED_OFF
    reached = {reason for _, reason in changes} | {DenseReason.SWITCHED_OFF}
    assert reached | set(REQUEST_REASONS) == set(DenseReason)
    assert not reached & set(REQUEST_REASONS)


def test_no_flag_of_a_layer_is_forgotten() -> None:
    flags = {f.name for f in dataclasses.fields(LayerTraits) if f.default is False}
    assert flags == set(FLAGS)


def test_every_reason_is_given_by_somebody() -> None:
    sources = [path.read_text() for path in Path(inspect.getfile(make_plan)).parent.glob("*.py")]
    given = set(re.findall(r"DenseReason\.([A-Z_]+)", "".join(sources)))
    assert given == {reason.name for reason in DenseReason}


def test_reasons_are_labels() -> None:
    assert all(reason.value.isidentifier() and reason.value.islower() for reason in DenseReason)


def test_the_requests_of_one_step() -> None:
    #         decode, short query, short context, sparse, padding, sparse, decode, decode
    rows = [1, 63, 64, 64, 0, 200, 1, 1]
    context = [9000, 9000, 2047, 2048, 0, 5000, 10, 5000]
    starts = np.concatenate(([0], np.cumsum(rows)))
    plan = make_plan(starts, context, min_query_tokens=64, min_prompt_tokens=2048)
    assert plan == Plan(
        core=[3, 5],
        sparse_tokens=264,
        dense=[Run(0, 3, 0, 128), Run(6, 8, 392, 394)],
        dense_tokens={
            DenseReason.DECODE: 3,
            DenseReason.SHORT_QUERY: 63,
            DenseReason.SHORT_CONTEXT: 64,
        },
        sparse_requests=2,
        dense_requests={
            DenseReason.DECODE: 3,
            DenseReason.SHORT_QUERY: 1,
            DenseReason.SHORT_CONTEXT: 1,
        },
    )
    assert plan.tokens == sum(rows)


def test_short_contexts_that_the_core_computes() -> None:
    #         decode, short query, below core_from, kept, sparse
    rows = [1, 63, 64, 64, 64]
    context = [9000, 300, 255, 256, 2048]
    starts = np.concatenate(([0], np.cumsum(rows)))
    plan = make_plan(starts, context, min_query_tokens=64, min_prompt_tokens=2048, core_from=256)
    assert plan == Plan(
        core=[3, 4],
        sparse_tokens=64,
        kept_tokens=64,
        dense=[Run(0, 3, 0, 128)],
        dense_tokens={
            DenseReason.DECODE: 1,
            DenseReason.SHORT_QUERY: 63,
            DenseReason.SHORT_CONTEXT: 64,
        },
        sparse_requests=1,
        kept=[(64, 256)],
        dense_requests=dict.fromkeys(
            (DenseReason.DECODE, DenseReason.SHORT_QUERY, DenseReason.SHORT_CONTEXT), 1
        ),
    )
    assert plan.tokens == sum(rows)


@pytest.mark.parametrize(("prefilling", "reason"), [(True, None), (False, DenseReason.DECODE)])
def test_what_is_told_of_a_request_counts_more_than_its_rows(
    prefilling: bool, reason: DenseReason | None
) -> None:
    """A last prompt token by itself is prefill; a speculated draft of many tokens is decode."""
    plan = make_plan(
        [0, 100, 101], [500, 501], min_query_tokens=1, min_prompt_tokens=1,
        prefilling=[prefilling] * 2,
    )  # fmt: skip
    assert plan.core == ([0, 1] if reason is None else [])
    assert plan.dense_tokens == ({} if reason is None else {reason: 101})


def test_without_sparse_requests_nothing_is_cut_up() -> None:
    plan = make_plan([0, 1, 51], [100, 50], min_query_tokens=64, min_prompt_tokens=2048)
    assert not plan.core
    assert plan.dense == []
    assert plan.dense_tokens == {DenseReason.DECODE: 1, DenseReason.SHORT_QUERY: 50}
    assert make_plan([0], [], min_query_tokens=64, min_prompt_tokens=1) == Plan()


Request = tuple[int, int, bool]  # rows, context before, prefilling
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 63, 64, 65, 300]),
        st.sampled_from([0, 1, 1983, 1984, 2047, 2048, 9000]),
        st.booleans(),
    ),
    max_size=12,
)


def plan_of(requests: list[Request], told: bool = True) -> Plan:
    starts = [0]
    for rows, _, _ in requests:
        starts.append(starts[-1] + rows)
    return make_plan(
        np.array(starts, dtype=np.int32),
        np.array([rows + before for rows, before, _ in requests], dtype=np.int32),
        min_query_tokens=64,
        min_prompt_tokens=2048,
        prefilling=[prefilling for *_, prefilling in requests] if told else None,
    )


@budget(max_examples=200, deadline=None, derandomize=True)
@given(REQUESTS, st.booleans())
def test_every_row_is_in_exactly_one_place(requests: list[Request], told: bool) -> None:
    plan = plan_of(requests, told)
    starts = np.concatenate(([0], np.cumsum([rows for rows, *_ in requests]))).astype(int)
    places = np.zeros(starts[-1], dtype=int)
    for r in plan.core:
        places[starts[r] : starts[r + 1]] += 1
    assert plan.sparse_tokens == places.sum()
    for run in plan.dense:
        assert (run.start, run.stop) == (starts[run.first], starts[run.last])
        assert run.start < run.stop
        places[run.start : run.stop] += 1
    assert plan.tokens == starts[-1]
    if plan.core:
        assert (places == 1).all()
        assert plan.core == sorted(set(plan.core))
        # Runs are as long as they can be: something sparse lies between two of them.
        for left, right in zip(plan.dense, plan.dense[1:], strict=False):
            assert any(left.last <= r < right.first for r in plan.core)
    else:
        assert plan.dense == []


@budget(max_examples=200, deadline=None, derandomize=True)
@given(REQUESTS, st.booleans())
def test_a_decision_depends_on_its_request_alone(requests: list[Request], told: bool) -> None:
    alone = [plan_of([request], told) for request in requests]
    together = plan_of(requests, told)
    assert together.core == [r for r, plan in enumerate(alone) if plan.core]
    for reason in REQUEST_REASONS:
        wanted = sum(plan.dense_tokens.get(reason, 0) for plan in alone)
        assert together.dense_tokens.get(reason, 0) == wanted


# What requests ask for

OFF = Setting(off=True)
ASKED = st.sampled_from([DEFAULT, OFF, Setting(threshold_scale=0.5), Setting(threshold_scale=2.0)])


def test_the_requests_of_one_step_ask_for_different_things() -> None:
    #       decode, short query, short, sparse, off, scaled, off, kept, off, scaled
    rows = [1, 63, 64, 100, 100, 100, 64, 64, 1, 80]
    context = [9000, 9000, 255, 2048, 2048, 5000, 256, 256, 5000, 3000]
    scaled = Setting(threshold_scale=2.0)
    asked = [OFF, OFF, OFF, DEFAULT, OFF, scaled, OFF, scaled, OFF, scaled]
    plan = make_plan(
        np.concatenate(([0], np.cumsum(rows))),
        context,
        min_query_tokens=64,
        min_prompt_tokens=2048,
        core_from=256,
        settings=asked,
    )
    assert plan.core == [3, 5, 7, 9]
    assert plan.scaled == {2.0: [5, 9]}
    assert plan.calls == [(1.0, [3, 7]), (2.0, [5, 9])]
    assert (plan.sparse_tokens, plan.kept_tokens) == (280, 64)
    # What would have been dense anyway keeps its reason.
    assert plan.dense_tokens == {
        DenseReason.DECODE: 2,
        DenseReason.SHORT_QUERY: 63,
        DenseReason.SHORT_CONTEXT: 64,
        DenseReason.REQUEST_OFF: 164,
    }
    assert plan.tokens == sum(rows)


@budget(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 63, 64, 300]), st.sampled_from([0, 1984, 9000]))),
    st.lists(ASKED, max_size=12),
    st.sampled_from([None, 64, 2048]),
)
def test_every_request_gets_what_it_asks_for(
    requests: list[tuple[int, int]], asked: list[Setting], core_from: int | None
) -> None:
    asked = asked[: len(requests)]
    starts = np.concatenate(([0], np.cumsum([rows for rows, _ in requests]))).astype(int)
    context = [rows + before for rows, before in requests]

    def planned(settings: list[Setting]) -> Plan:
        return make_plan(
            starts,
            context,
            min_query_tokens=64,
            min_prompt_tokens=2048,
            core_from=core_from,
            settings=settings,
        )

    plain, plan = planned([]), planned(asked)
    told = asked + [DEFAULT] * (len(requests) - len(asked))
    assert plan.core == [r for r in plain.core if not told[r].off]
    assert sorted(r for _, these in plan.calls for r in these) == plan.core
    for scale, these in plan.calls:
        assert these == sorted(set(these)) and these
        for r in these:
            sparse = context[r] >= 2048
            assert scale == (told[r].threshold_scale if sparse else 1.0)
    off = sum(requests[r][0] for r in plain.core if told[r].off)
    assert plan.dense_tokens.get(DenseReason.REQUEST_OFF, 0) == off
    for reason in (DenseReason.DECODE, DenseReason.SHORT_QUERY, DenseReason.SHORT_CONTEXT):
        assert plan.dense_tokens.get(reason) == plain.dense_tokens.get(reason)
    assert plan.tokens == plain.tokens == starts[-1]
