"""loadtest/quality.py: its texts, its figures, and its model beside transformers' own attention."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_sparse_backend.profile import ModelFacts, Profile
from vllm_sparse_backend.selection import DENSE, Static, parse_policy

SCRIPT = Path(__file__).parents[1] / "loadtest" / "quality.py"
TOKENS = 512
WINDOW_ONLY = Static(sink=16, local=0)


@pytest.fixture(scope="module")
def quality() -> Any:
    """The script as a module; loadtest/ is no package."""
    spec = importlib.util.spec_from_file_location("loadtest_quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader(quality: Any) -> Iterator[Any]:
    """One thread: two wait for each other for most of the time if anything else computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield quality.Reader(TOKENS, chunk=256, min_prompt=0)
    torch.set_num_threads(threads)


def read(quality: Any, reader: Any, documents: list[Any], policy: Any) -> Any:
    reading = quality.Reading()
    for document in documents:
        reader.read(document, quality.Uniform(policy), reading)
    return reading


def test_keeping_everything_is_transformers_own_attention(
    quality: Any, reader: Any, smollm2: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (document,) = quality.make_documents(reader.encode, quality.Task.CODE, TOKENS, 1, seed=0)
    reading = read(quality, reader, [document], DENSE)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.float32, attn_implementation="sdpa"
    )
    ids = torch.tensor([document.ids])
    with torch.inference_mode():
        logits = theirs(input_ids=ids).logits[0, document.scored - 1 : -1]
    truth = torch.nn.functional.cross_entropy(logits, ids[0, document.scored :], reduction="none")
    assert reading.losses[0].shape == truth.shape
    assert math.exp(reading.losses[0].mean()) == pytest.approx(math.exp(truth.mean()), rel=0.005)
    assert reading.computed == reading.causal > 0


def test_a_window_alone_cannot_copy(quality: Any, reader: Any) -> None:
    documents = quality.make_documents(reader.encode, quality.Task.COPY, TOKENS, 1, seed=0)
    dense, window = (read(quality, reader, documents, p) for p in (DENSE, WINDOW_ONLY))
    case = quality.judge(quality.Task.COPY, TOKENS, quality.Uniform(WINDOW_ONLY), window, dense)
    assert case.density < 0.5
    assert case.change_percent > 100
    assert case.error_percent is None  # of one document
    assert case.worst_nats > 1


def test_a_profile_is_followed_layer_by_layer(quality: Any, reader: Any) -> None:
    (document,) = quality.make_documents(reader.encode, quality.Task.COPY, TOKENS, 1, seed=0)
    facts = ModelFacts(
        architecture="LlamaForCausalLM", num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64
    )
    window_late = {layer: dict.fromkeys(range(9), WINDOW_ONLY) for layer in range(15, 30)}
    profile = Profile.build(facts, window_late, defaults=DENSE)
    reading, whole = quality.Reading(), read(quality, reader, [document], WINDOW_ONLY)
    reader.read(document, quality.Profiled(profile), reading)
    assert reading.causal == whole.causal
    assert reading.causal - reading.computed == (whole.causal - whole.computed) / 2


def test_a_needle_is_found_and_out_of_the_window_lost(quality: Any, reader: Any) -> None:
    documents = quality.make_documents(reader.encode, quality.Task.NEEDLES, TOKENS, 1, seed=0)
    middle = documents[len(documents) // 2]
    assert read(quality, reader, [middle], DENSE).found == [True]
    assert read(quality, reader, [middle], WINDOW_ONLY).found == [False]


def test_short_contexts_are_dense(quality: Any, reader: Any) -> None:
    (document,) = quality.make_documents(reader.encode, quality.Task.DOCS, TOKENS, 1, seed=0)
    late = quality.Reader(TOKENS, chunk=256, min_prompt=TOKENS + 1)
    reading = read(quality, late, [document], WINDOW_ONLY)
    assert reading.computed == reading.causal


@pytest.mark.parametrize("name", ["code", "docs", "copy", "needles"])
def test_documents_are_disjoint_of_their_length_and_repeatable(
    quality: Any, reader: Any, name: str
) -> None:
    task = quality.Task(name)
    made = quality.make_documents(reader.encode, task, TOKENS, 3, seed=1)
    assert all(len(document.ids) == TOKENS for document in made)
    assert len({tuple(document.ids) for document in made}) == len(made)
    assert made == quality.make_documents(reader.encode, task, TOKENS, 3, seed=1)
    assert made != quality.make_documents(reader.encode, task, TOKENS, 3, seed=2)
    if name == "copy":
        assert all(d.ids[: d.scored] == d.ids[d.scored :] for d in made)
    if name == "needles":
        assert len(made) == 3 * len(quality.DEPTHS)
        for document in made:
            answer = document.ids[document.scored :]
            places = [i for i in range(TOKENS) if document.ids[i : i + len(answer)] == answer]
            assert len(places) == 2  # where it is hidden, and as the answer
            assert document.prompt == document.scored


def test_more_text_than_there_is_is_refused(quality: Any, reader: Any) -> None:
    with pytest.raises(Exception, match="tokens of it, want"):
        quality.make_documents(reader.encode, quality.Task.DOCS, 16384, 100, seed=0)


def test_what_is_reported(quality: Any) -> None:
    dense = quality.Reading([torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])], [True, False])
    ours = quality.Reading(
        [torch.tensor([1.0, 1.2]), torch.tensor([2.0, 2.0])], [False, False], computed=1, causal=4
    )
    policy = quality.Uniform(parse_policy({"selector": "sale"}))
    case = quality.judge(quality.Task.CODE, 4, policy, ours, dense)
    assert case.policy == "sale"
    assert case.density == 0.25
    assert case.perplexity == pytest.approx(math.exp(1.55))
    assert case.change_percent == pytest.approx(100 * math.expm1(0.05))
    assert case.error_percent == pytest.approx(100 * math.exp(0.05) * 0.05)
    assert case.worst_nats == pytest.approx(0.2)
    assert (case.found, case.asked) == (0, 2)


def test_theta_is_that_of_vllms_dynamic_scaling(quality: Any) -> None:
    # factor 2, 16384 positions of 8192 trained: (2 * 2 - 1) ** (D / (D - 2)) times the theta
    assert quality.rope_options(8192) == {}
    assert quality.rope_options(8193)["rope_parameters"]["rope_theta"] == pytest.approx(
        100000.0 * 3 ** (64 / 62)
    )


@pytest.mark.parametrize("policy", ["{", '{"selector": "none"}', '{"selector": "sale", "tau": -1}'])
def test_a_wrong_policy_stops_before_anything_is_loaded(quality: Any, policy: str) -> None:
    app = quality.typer.Typer()
    app.command()(quality.main)
    done = CliRunner().invoke(app, ["--policy", policy])
    assert done.exit_code == 2
