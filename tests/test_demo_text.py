"""The demo's documents: exact, reproducible, and with their needles where they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.demo.plan import DEPTHS, LENGTHS, RESERVE, SHORTEST
from vllm_sparse_backend.demo.text import ANSWER_TOKENS, NAMES, Needle, build_document

_TOKENIZER: list[Any] = []  # hypothesis takes no fixture of a narrower scope than a module's


def tokenizer() -> Any:
    if not _TOKENIZER:
        from transformers import AutoTokenizer

        _TOKENIZER.append(AutoTokenizer.from_pretrained(ensure_model()))
    return _TOKENIZER[0]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(300, 6000),
    seed=st.integers(0, 10**8),
    depths=st.lists(st.floats(0, 1), max_size=4),
)
def test_a_document_has_its_length_and_states_each_needle_once(
    tokens: int, seed: int, depths: list[float]
) -> None:
    document = build_document(tokenizer(), tokens, seed=seed, depths=depths)
    assert len(document.token_ids) == tokens
    text = tokenizer().decode(document.token_ids)
    assert [needle.depth for needle in document.needles] == sorted(depths)
    assert len({needle.name for needle in document.needles}) == len(depths)
    places = []
    for needle in document.needles:
        assert text.count(needle.sentence) == 1
        assert text.count(f"The {needle.name} is") == 1  # nothing else answers the question
        places.append(text.index(needle.sentence))
    assert places == sorted(places)


@pytest.mark.parametrize("seed", range(3))
def test_needles_lie_at_their_depth(seed: int) -> None:
    document = build_document(tokenizer(), 8000, seed=seed, depths=DEPTHS)
    ids = tokenizer().decode(document.token_ids)
    for needle in document.needles:
        before = len(tokenizer().encode(ids[: ids.index(needle.sentence)]))
        assert before / 8000 == pytest.approx(needle.depth, abs=0.06)  # blocks are not cut


def test_the_same_arguments_give_the_same_document() -> None:
    first, second = (build_document(tokenizer(), 2000, seed=7, depths=[0.5]) for _ in range(2))
    assert first == second


def test_seeds_give_documents_of_their_own() -> None:
    made = {build_document(tokenizer(), 1000, seed=seed).token_ids for seed in range(20)}
    assert len(made) == 20


@pytest.mark.parametrize("length", [SHORTEST, *LENGTHS])
def test_question_and_answer_fit_into_what_a_length_reserves(length: int) -> None:
    document = build_document(tokenizer(), length - RESERVE, seed=1, depths=DEPTHS)
    for needle in document.needles:
        prompt = document.prompt(tokenizer(), needle)
        assert prompt[: len(document.token_ids)] == list(document.token_ids)
        assert tokenizer().decode(prompt).endswith(needle.question)
        assert len(prompt) + ANSWER_TOKENS <= length


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_question_that_fits(name: str) -> None:
    ids = tokenizer().encode(Needle(name, "12345", 0.5).question)
    assert len(ids) + ANSWER_TOKENS <= RESERVE


@pytest.mark.parametrize(
    ("continuation", "right"),
    [
        (" 12345. Remember it.", True),
        ("12345", True),
        ("\n12345\n", True),
        (" 123456", False),
        (" 1234", False),
        (" not 12345", False),
        ("", False),
    ],
)
def test_only_the_number_itself_is_right(continuation: str, right: bool) -> None:
    assert Needle("door code", "12345", 0.5).right(continuation) is right


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into 10"):
        build_document(tokenizer(), 10, seed=1, depths=[0.5])
    with pytest.raises(ValueError, match=r"numbers in 0\.\.1"):
        build_document(tokenizer(), 2000, seed=1, depths=[1.5])
    with pytest.raises(ValueError, match=f"at most {len(NAMES)}"):
        build_document(tokenizer(), 2000, seed=1, depths=[0.5] * (len(NAMES) + 1))


def test_the_tokenizer_is_the_models(smollm2: Path) -> None:
    # The converter puts the split into single digits back, without which no needle is found.
    ids = tokenizer().encode("12345")
    assert [tokenizer().decode([token]) for token in ids] == list("12345")
