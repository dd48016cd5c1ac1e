"""loadtest/ab: workload files, and prompts of exactly the tokens they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from _loadtest_ab import module

from vllm_sparse_backend.demo.text import Needle
from vllm_sparse_backend.errors import TextError

W: Any = module("workload")
P: Any = module("prompts")

BASE: dict[str, Any] = {
    "name": "own",
    "server": {"max_model_len": 4096},
    "traffic": {"request_rate": 1},
    "requests": [{"name": "a", "count": 2, "prompt_tokens": 100, "output_tokens": 4}],
    "slo": {"ttft_seconds": 1, "ttft_seconds_per_1000_tokens": 2},
}
SHARED = {"kind": "shared_prefix", "prefix_tokens": 1024, "prompt_tokens": [1200, 2000]}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def workload(*requests: dict[str, Any], **fields: Any) -> Any:
    filled = [{"output_tokens": 4, **each} for each in requests]
    return W.Workload.model_validate({**BASE, "requests": filled, **fields})


@pytest.mark.parametrize("name", list(W.shipped()))
def test_what_ships_is_valid_and_says_what_it_is(name: str) -> None:
    found = W.load_workload(name)
    assert found.name == name and found.about
    again = W.Workload.model_validate_json(found.model_dump_json())
    assert again == found


def test_the_help_names_what_ships() -> None:
    text = " ".join((module("__main__").main.__doc__ or "").split())
    assert f"Workloads that ship: {', '.join(W.shipped())}." in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"traffic": {"request_rate": 0}}, "traffic.request_rate: input should be greater than 0"),
        ({"trafic": {}}, "trafic: unknown field (did you mean 'traffic'?)"),
        ({"requests": []}, "requests: tuple should have at least 1 item"),
        ({"requests": BASE["requests"] * 2}, "want a name of its own for each, got a, a"),
        ({"server": {"max_model_len": 512, "arguments": "-x"}}, "server.arguments: "),
        ({"server": {}}, "server.max_model_len: missing"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    write: Callable[[str, str], Path], change: dict[str, Any], message: str
) -> None:
    path = write("own.yaml", json.dumps({**BASE, **change}))
    with pytest.raises(W.WorkloadError) as refused:
        W.load_workload(str(path))
    assert str(path) in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passages": 4}, "a: passages: is of kind passages, got text"),
        ({"prompt_tokens": [200, 100]}, "prompt_tokens: want 16 or more"),
        ({"prompt_tokens": 4093}, "up to 4097 tokens, want at most max_model_len, 4096"),
        ({**SHARED, "prefix_tokens": 1190}, "prefix_tokens: want 64 to 1136"),
    ],
)
def test_requests_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        workload({**BASE["requests"][0], **change})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1", "want a mapping, got list"), ("a: [", "not YAML"), (b"\xff\xfe\x00", "not ")],
)
def test_what_is_no_workload_is_refused(
    write: Callable[[str, Any], Path], content: Any, message: str
) -> None:
    with pytest.raises(W.WorkloadError, match=message):
        W.load_workload(str(write("own.yaml", content)))


def test_an_unknown_name_lists_those_that_ship() -> None:
    with pytest.raises(W.WorkloadError, match="one of chat, lengths"):
        W.load_workload("chatt")


def test_a_longer_prompt_may_take_longer() -> None:
    assert workload(*BASE["requests"]).slo.ttft_limit(3000) == pytest.approx(7)


def test_prompts_have_exactly_their_tokens(tokenizer: Any) -> None:
    made = P.make_dataset(
        workload(
            {"name": "text", "count": 40, "prompt_tokens": [16, 700]},
            {"name": "question", "kind": "question", "count": 8, "prompt_tokens": [200, 3000]},
            {"name": "rag", "kind": "passages", "count": 4, "prompt_tokens": [1000, 3000]},
            {"name": "shared", **SHARED, "prefixes": 2, "count": 6},
        ),
        tokenizer,
    )
    assert len(made.prompts) == len(made.texts) == 58
    for prompt, text in zip(made.prompts, made.texts, strict=True):
        assert len(tokenizer(text).input_ids) == prompt.prompt_tokens
        if prompt.answer is not None:
            assert f"{prompt.answer}. Remember it." in text  # hidden, and asked for at the end
            assert text.rpartition("\n\n")[2].startswith("Remember it. The ")
            assert prompt.right(f" {prompt.answer}.") and not prompt.right(f" {prompt.answer}1")
    assert {p.requests for p in made.prompts if p.answer is None} == {"text"}
    assert all("Passage 8\n\n" in text for _, text in _of(made, "rag"))


def test_only_shared_prefixes_are_shared(tokenizer: Any) -> None:
    made = P.make_dataset(
        workload(
            {"name": "text", "count": 150, "prompt_tokens": [16, 64]},
            {"name": "shared", **SHARED, "prefixes": 2, "count": 6},
        ),
        tokenizer,
    )
    begins = [text[:64] for _, text in _of(made, "text")]
    assert len(set(begins)) == 150
    shared = [tokenizer(text).input_ids for _, text in _of(made, "shared")]
    assert len({tuple(ids[:1000]) for ids in shared}) == 2  # a token may merge at the very end
    assert len({tuple(ids[:1100]) for ids in shared}) == 6


def test_the_same_seed_gives_the_same_prompts(tokenizer: Any) -> None:
    requests = {"name": "a", "kind": "question", "count": 3, "prompt_tokens": [200, 400]}
    one, two = (P.make_dataset(workload(requests), tokenizer) for _ in range(2))
    other = P.make_dataset(workload(requests, seed=1), tokenizer)
    assert one == two != other


def test_each_kind_is_spread_over_the_run(tokenizer: Any) -> None:
    made = P.make_dataset(
        workload(
            {"name": "short", "count": 60, "prompt_tokens": [16, 32]},
            {"name": "long", "count": 6, "prompt_tokens": 256},
        ),
        tokenizer,
    )
    at = [n for n, prompt in enumerate(made.prompts) if prompt.requests == "long"]
    assert all(later - sooner <= 23 for sooner, later in pairwise([0, *at, 66]))


def test_own_text_is_used_and_too_little_of_it_is_refused(
    tokenizer: Any, write: Callable[[str, str], Path]
) -> None:
    paragraphs = "\n\n".join(f"Line {n} of a text of our own, number {n}." for n in range(300))
    write("notes.txt", paragraphs)
    path = write("own.yaml", json.dumps({**BASE, "text": ["notes.txt"]}))
    made = P.make_dataset(W.load_workload(str(path)), tokenizer)
    assert all("of a text of our own" in text for text in made.texts)
    write("notes.txt", "One paragraph only.")
    with pytest.raises(TextError, match="name more text"):
        P.make_dataset(W.load_workload(str(path)), tokenizer)


def test_the_dataset_is_what_vllm_bench_reads(tokenizer: Any, tmp_path: Path) -> None:
    from vllm.benchmarks.datasets import CustomDataset

    made = P.make_dataset(workload(*BASE["requests"]), tokenizer)
    path = made.write(tmp_path)
    read = CustomDataset(dataset_path=str(path), disable_shuffle=True, random_seed=0).sample(
        tokenizer=tokenizer, num_requests=2, output_len=-1, skip_chat_template=True
    )
    assert [each.prompt for each in read] == list(made.texts)
    assert [each.prompt_len for each in read] == [100, 100]
    assert [each.expected_output_len for each in read] == [4, 4]
    assert len(json.loads((tmp_path / "requests.json").read_text())) == 2


def test_an_answer_is_judged_as_the_demo_does() -> None:
    assert Needle("", "12345", 0.0).right(" 12345")
    prompt = P.Prompt(requests="a", prompt_tokens=100, output_tokens=4)
    assert prompt.right("anything") is None


def _of(made: Any, name: str) -> list[tuple[Any, str]]:
    pairs = zip(made.prompts, made.texts, strict=True)
    return [(prompt, text) for prompt, text in pairs if prompt.requests == name]
