"""Generators: exact lengths, the same for the same seed, and answers that stand where they say."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.demo.model import ensure_model
from vllm_sparse_backend.errors import TextError
from vllm_sparse_backend.tasks.catalog import LIKELIHOOD, Task, make_batches
from vllm_sparse_backend.tasks.items import Question
from vllm_sparse_backend.tasks.source import Source, read_sources, read_texts
from vllm_sparse_backend.tasks.stream import TokenStream

_STREAMS: list[TokenStream] = []  # hypothesis takes no fixture of a narrower scope than a module's
ASKING = [task for task in Task if task not in LIKELIHOOD]


def streams() -> list[TokenStream]:
    if not _STREAMS:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(ensure_model())
        _STREAMS.extend(TokenStream(tokenizer, source) for source in read_sources())
    return _STREAMS


def decode(ids: tuple[int, ...]) -> str:
    text: str = streams()[0].tokenizer.decode(ids)
    return text


@pytest.mark.parametrize("task", Task)
@settings(max_examples=5, deadline=None)
@given(tokens=st.integers(512, 9000), seed=st.integers(0, 10**6))
def test_documents_have_their_exact_length_and_are_the_same_again(
    task: Task, tokens: int, seed: int
) -> None:
    made = make_batches(streams(), task, tokens, 2, seed)
    for batch in made:
        assert [len(item.token_ids) for item in batch.items] == [tokens, tokens]
        assert len({item.token_ids for item in batch.items}) == 2
    assert make_batches(streams(), task, tokens, 2, seed) == made


@pytest.mark.parametrize("task", Task)
def test_seeds_give_other_documents(task: Task) -> None:
    made = [make_batches(streams(), task, 1000, 1, seed)[0].items[0] for seed in range(5)]
    assert len({item.token_ids for item in made}) == 5


@pytest.mark.parametrize("task", ASKING)
@pytest.mark.parametrize("tokens", [600, 4000])
def test_every_answer_stands_once_in_the_context_at_its_depth(task: Task, tokens: int) -> None:
    (batch,) = make_batches(streams(), task, tokens, 4, seed=3)
    assert batch.text == "docs+code"
    for item in batch.items:
        assert item.scored is None and len(item.questions) >= 4
        text = decode(item.token_ids)
        assert len({question.name for question in item.questions}) == len(item.questions)
        for question in item.questions:
            # The question ends in what stands before the answer, word for word.
            asked = decode(question.token_ids).split("Remember it.")[-1].strip()
            stated = f"{asked} {question.expected}"
            assert len(re.findall(rf"\b{asked}(?!\w)", text)) == 1, asked
            (place,) = re.finditer(rf"\b{stated}(?!\w)", text)
            before = len(streams()[0].encode(text[: place.start()]))
            assert before / tokens == pytest.approx(question.depth, abs=0.12)


@pytest.mark.parametrize("task", ASKING)
def test_what_was_hidden_is_right_and_nothing_else(task: Task) -> None:
    for item in make_batches(streams(), task, 2000, 2, seed=1)[0].items:
        answers = [question.expected for question in item.questions]
        for question in item.questions:
            assert question.right(f" {question.expected}. Remember it.")
            assert question.right(question.expected)
            assert not question.right(f" {question.expected}7")
            assert not question.right(f" not {question.expected}")
            others = [answer for answer in answers if answer != question.expected]
            assert not any(question.right(f" {answer}") for answer in others)


@pytest.mark.parametrize("task", ASKING)
def test_which_question_comes_first_varies(task: Task) -> None:
    (batch,) = make_batches(streams(), task, 2000, 8, seed=0)
    assert len({item.questions[0].depth for item in batch.items}) > 1


@pytest.mark.parametrize("task", Task)
def test_special_tokens_stand_in_front(task: Task) -> None:
    class WithBos:
        def __len__(self) -> int:
            return len(streams()[0].tokenizer)

        def __getattr__(self, name: str) -> Any:
            return getattr(streams()[0].tokenizer, name)

        def encode(self, text: str, add_special_tokens: bool = True, **more: Any) -> list[int]:
            ids: list[int] = streams()[0].tokenizer.encode(text, add_special_tokens=False, **more)
            return [1, *ids] if add_special_tokens else ids

    stream = TokenStream(WithBos(), streams()[0].source)
    for item in make_batches([stream], task, 1001, 2, seed=0)[0].items:
        assert item.token_ids[0] == 1 and 1 not in item.token_ids[1:]
        assert len(item.token_ids) == 1001


def test_a_copy_repeats_what_is_scored() -> None:
    for tokens in (1000, 1001):
        for batch in make_batches(streams(), Task.COPY, tokens, 2, seed=0):
            for item in batch.items:
                assert item.scored is not None
                again = item.token_ids[item.scored :]
                assert len(again) == tokens // 2
                assert item.token_ids[item.scored - len(again) : item.scored] == again


def test_text_is_scored_where_the_context_is_long() -> None:
    made = make_batches(streams(), Task.TEXT, 1000, 3, seed=0)
    assert [batch.text for batch in made] == ["docs", "code"]
    assert [item.scored for batch in made for item in batch.items] == [500] * 6


@given(
    tokens=st.integers(1, 50), count=st.integers(1, 10), spare=st.integers(0, 30),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_slices_do_not_overlap(tokens: int, count: int, spare: int, seed: int) -> None:
    stream = _numbers(tokens * count + spare)
    slices = stream.slices(tokens, count, random.Random(seed))
    every = [token for piece in slices for token in piece]
    assert len(set(every)) == len(every) == tokens * count
    for piece in slices:
        assert list(piece) == list(range(piece[0], piece[0] + tokens))


def test_a_text_that_is_too_short_is_named_with_both_numbers() -> None:
    with pytest.raises(
        TextError, match=r"numbers\.txt: want 30 tokens for 3 documents of 10, got 2"
    ):
        _numbers(29).slices(10, 3, random.Random(0))


def test_too_many_needles_for_a_length_are_refused() -> None:
    with pytest.raises(TextError, match=r"what is hidden takes 1\d\d of 200 tokens"):
        make_batches(streams(), Task.NEEDLES, 200, 1, 0)


def _numbers(count: int) -> TokenStream:
    """A text whose tokens are 0, 1, 2, ..."""

    class Numbers:
        def encode(self, text: str, **more: Any) -> list[int]:
            return [int(word) for word in text.split()]

    words = " ".join(map(str, range(count)))
    return TokenStream(Numbers(), Source("text", (words,), ("numbers.txt",)))


Write = Callable[[str, str | bytes], Path]


def test_files_and_folders_are_read_in_order(tmp_path: Path) -> None:
    for name, content in {
        "b/two.txt": b"two",
        "b/one.md": b"one",
        "b/c/three": "drei ü".encode(),
        "b/picture.png": b"\x89PNG\0\0",
        "b/empty.txt": b"",
        "b/.hidden": b"hidden",
        "a.txt": b"\xef\xbb\xbfa",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / "b", tmp_path / "a.txt"]
    assert read_texts(paths) == ["drei ü", "one", "two", "a"]
    (source,) = read_sources(paths)
    assert source.read == tuple(map(str, paths))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "want text, got an empty file"),
        (b"\x7fELF\0\0", "got a binary file"),
        (b"abc \xff\xfe", "want UTF-8 text, got something else at byte 4"),
    ],
)
def test_what_is_no_text_is_refused(write: Write, content: bytes, message: str) -> None:
    path = write("given", content)
    with pytest.raises(TextError, match=message) as caught:
        read_texts([path])
    assert str(path) in str(caught.value)


def test_missing_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="No such file"):
        read_texts([tmp_path / "missing"])
    with pytest.raises(TextError, match="got one without any"):
        read_texts([tmp_path])


def test_built_in_texts_are_long_and_repeat_little() -> None:
    docs, code = read_sources()
    assert sum(map(len, code.texts)) > 10**6
    paragraphs = [part for text in docs.texts for part in text.split("\n\n") if len(part) > 80]
    assert len(paragraphs) > 1000 and len(set(paragraphs)) == len(paragraphs)


@pytest.mark.parametrize(
    ("continuation", "right"),
    [(" 12345", True), ("\n12345.", True), ("123456", False), ("1234", False), ("", False)],
)
def test_only_the_expected_itself_is_right(continuation: str, right: bool) -> None:
    assert Question("door code", (1,), "12345", 0.5).right(continuation) is right


def test_generators_need_neither_torch_nor_vllm() -> None:
    import subprocess
    import sys

    script = (
        "import sys, vllm_sparse_backend.tasks.catalog\n"
        "sys.exit(', '.join({'torch', 'vllm', 'transformers'} & sys.modules.keys()) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
