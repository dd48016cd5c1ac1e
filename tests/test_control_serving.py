"""Requests with settings of their own at a real server, asked by the openai client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _attention import needs_core
from _engine import Scenario, environment, generate
from _models import token_ids
from _server import NAME, Server, counted, serve

pytestmark = needs_core

LAYERS, CHUNK = 2, 512
SECTION: dict[str, Any] = {
    "min_prompt_tokens": CHUNK,
    "dense_core": False,  # or which prompts are CPU_ATTN's would depend on the machine
    # High: random weights spread attention over every tile.
    "policy": {"selector": "sale", "tau": 0.2, "sink": 16, "local": 64},
}
# A document of whole chunks: behind its cached blocks a question is cut as it is without them.
DOCUMENT = token_ids(1, 4 * CHUNK)
QUESTIONS = [token_ids(seed, 100) for seed in (2, 3)]
LOW, HIGH = "threshold_scale=0.01", "threshold_scale=4"
SETTINGS = ["on", "off", LOW, HIGH]
TOKENS = 16


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    options = ["--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "32"]
    folder = tmp_path_factory.mktemp("server")
    with serve(tiny_llama, SECTION, folder, *options, "--chat-template", template) as started:
        yield started


@dataclass(frozen=True)
class Said:
    """An answer's tokens with their logprobs, and how many prompt tokens were cached."""

    tokens: list[int]
    logprobs: list[float]
    cached: int


def client(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=240)


def ask(server: Server, prompt: list[int], setting: object = None, salt: str = "") -> Said:
    """The greedy continuation. ``setting``: None, to say nothing of it."""
    more: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    more |= {} if setting is None else {"vllm_xargs": {"sparse_prefill": setting}}
    more |= {"cache_salt": salt} if salt else {}
    with client(server) as asking:
        answer: Any = asking.completions.create(
            model=NAME, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=0, extra_body=more
        )
    choice, details = answer.choices[0], answer.usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details else 0
    return Said(choice.token_ids, choice.logprobs.token_logprobs, cached)


class Counted:
    """What the server has counted since this was made."""

    def __init__(self, server: Server) -> None:
        self.server, self.before = server, server.metrics()

    def __call__(self, metric: str, **labels: str) -> int:
        after, before = (
            counted(samples, metric, **labels) for samples in (self.server.metrics(), self.before)
        )
        return after - before


# What is refused

GARBAGE: list[tuple[object, str]] = [
    ("maybe", "sparse_prefill: want \"on\", \"off\" or \"threshold_scale=X\""),
    ("threshold_scale=0", "threshold_scale: input should be greater than or equal to 0.01"),
    ("threshold_scale=nan", "threshold_scale: input should be a finite number"),
    ("error_budget=0.01", "error_budget: a profile holds one threshold for each head"),
    (1, "got 1"),
    (["off"], "got ['off']"),
]  # fmt: skip


def completion(asking: Any, xargs: dict[str, Any], **more: Any) -> Any:
    return asking.completions.create(
        model=NAME, prompt="w5 w6", max_tokens=2, extra_body={"vllm_xargs": xargs}, **more
    )


def chat(asking: Any, xargs: dict[str, Any], **more: Any) -> Any:
    return asking.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "w5 w6"}],
        max_tokens=2,
        extra_body={"vllm_xargs": xargs},
        **more,
    )


def response(asking: Any, xargs: dict[str, Any], **more: Any) -> Any:
    return asking.responses.create(
        model=NAME, input="w5 w6", max_output_tokens=2, extra_body={"vllm_xargs": xargs}, **more
    )


@pytest.mark.parametrize("endpoint", [completion, chat, response])
def test_garbage_is_a_400_that_says_what_was_wanted(
    server: Server, endpoint: Callable[..., Any]
) -> None:
    from openai import BadRequestError

    grown = Counted(server)
    with client(server) as asking:
        for value, says in GARBAGE:
            with pytest.raises(BadRequestError) as caught:
                endpoint(asking, {"sparse_prefill": value})
            refused: Any = caught.value
            assert refused.status_code == 400
            assert says in refused.body["message"], value
        with pytest.raises(BadRequestError, match="want the name 'sparse_prefill'"):
            endpoint(asking, {"sparse-prefill": "off"})
        # In a stream, too, before its status is sent.
        for setting in ("maybe", "threshold_scale=0"):
            with pytest.raises(BadRequestError, match="sparse_prefill: "):
                endpoint(asking, {"sparse_prefill": setting}, stream=True)
        # vLLM's own word: it lets no object through.
        with pytest.raises(BadRequestError, match="vllm_xargs"):
            endpoint(asking, {"sparse_prefill": {"threshold_scale": 2}})
        assert grown("layer_tokens") == 0
        for value in SETTINGS:
            endpoint(asking, {"sparse_prefill": value})
    assert grown("layer_tokens") > 0


def test_beam_search_which_would_ignore_it_is_refused(server: Server) -> None:
    import httpx

    for path, prompt in (
        ("completions", {"prompt": "w5 w6"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "w5"}]}),
    ):
        body = {"model": NAME, **prompt, "use_beam_search": True, "n": 2, "max_tokens": 2}
        answers = [
            httpx.post(f"{server.url}/{path}", json={**body, **more}, timeout=60)
            for more in ({}, {"vllm_xargs": {"sparse_prefill": "off"}})
        ]
        assert [answer.status_code for answer in answers] == [200, 400]
        assert "want a request without use_beam_search" in answers[1].text


# What is computed, and what is shared


def test_settings_share_blocks_with_themselves_alone(
    server: Server, tiny_llama: Path, tmp_path: Path
) -> None:
    prompts = [DOCUMENT + question for question in QUESTIONS]
    first: dict[str, list[Said]] = {}
    for setting in SETTINGS:
        grown = Counted(server)
        first[setting] = [ask(server, prompt, setting) for prompt in prompts]
        # Nothing of what was computed under another setting, all of the document under this one.
        assert [said.cached for said in first[setting]] == [0, len(DOCUMENT)], setting
        computed = LAYERS * (len(prompts[0]) + len(QUESTIONS[1]))
        off = grown("layer_tokens", path="dense", reason="request_off")
        sparse = grown("layer_tokens", path="sparse")
        assert (off, sparse) == ((computed, 0) if setting == "off" else (0, computed))
        tiles = grown("tiles", kind="computed"), grown("tiles", kind="causal")
        assert (tiles == (0, 0)) if setting == "off" else (0 < tiles[0] <= tiles[1])

    # Each as under a salt of its own, where nothing is cached: bit for bit.
    for setting in SETTINGS:
        alone = [ask(server, p, setting, salt=f"{setting} {n}") for n, p in enumerate(prompts)]
        assert [said.cached for said in alone] == [0, 0]
        for one, other in zip(first[setting], alone, strict=True):
            assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs), setting
    assert len({tuple(first[setting][0].logprobs) for setting in ("on", "off", HIGH)}) == 3

    # Off is what a server without this backend says, saying nothing is on, and so is a scale of 1.
    engine = {"dtype": "float32", "max_num_batched_tokens": CHUNK}
    (dense,) = generate(
        [Scenario(str(tiny_llama), [[prompt] for prompt in prompts], "CPU_ATTN", engine=engine)],
        tmp_path,
    )
    for said, (answer,) in zip(first["off"], dense.answers, strict=True):
        assert said.tokens == answer.tokens
        assert said.logprobs == pytest.approx(answer.logprobs, abs=1e-5)
    for same in (None, "threshold_scale=1"):
        said = ask(server, prompts[1], same)
        assert said.cached == len(prompts[1]) // 128 * 128
        assert said.tokens == first["on"][1].tokens


def test_a_scale_moves_the_density(server: Server) -> None:
    prompt, shares = token_ids(9, 3000), []
    for setting in (LOW, "on", HIGH):
        grown = Counted(server)
        ask(server, prompt, setting)
        shares.append(grown("tiles", kind="computed") / grown("tiles", kind="causal"))
    assert shares[0] > shares[1] > shares[2]


def test_no_salt_opens_anothers_blocks(server: Server) -> None:
    prompt = token_ids(11, 1024)
    assert ask(server, prompt, "off", salt="mine").cached == 0
    assert ask(server, prompt, "off", salt="mine").cached == 1024 - 128
    for setting, salt in (
        ("off", ""),
        ("off", "yours"),
        (None, "mine"),
        (HIGH, "mine"),
        # What the composed salts look like; no client may write its way into them.
        (None, "sparse_prefill:off;"),
        (None, "sparse_prefill:off;mine"),
    ):
        assert ask(server, prompt, setting, salt=salt).cached == 0, (setting, salt)


def test_settings_of_all_kinds_at_once(server: Server) -> None:
    prompts = [token_ids(200 + n, 700 + 150 * n) for n in range(12)]
    asked = [SETTINGS[n % 4] for n in range(12)]
    alone = [ask(server, *pair, salt=f"a{n}") for n, pair in enumerate(zip(prompts, asked))]  # noqa: B905
    grown = Counted(server)
    with ThreadPoolExecutor(len(prompts)) as pool:
        salts = [f"b{n}" for n in range(12)]
        together = list(pool.map(ask, [server] * 12, prompts, asked, salts))
    for setting, one, other in zip(asked, alone, together, strict=True):
        assert other.cached == 0
        if setting == "off":  # what is sparse depends, by a little, on how prompts are cut
            assert other.tokens == one.tokens
    lengths = {
        is_off: sum(len(p) for p, it in zip(prompts, asked, strict=True) if (it == "off") == is_off)
        for is_off in (True, False)
    }
    off = grown("layer_tokens", path="dense", reason="request_off")
    sparse = grown("layer_tokens", path="sparse")
    assert 0.5 * LAYERS * lengths[True] < off <= LAYERS * lengths[True]
    assert 0.5 * LAYERS * lengths[False] < sparse <= LAYERS * lengths[False]


def test_several_prompts_and_answers_of_one_request(server: Server) -> None:
    grown = Counted(server)
    prompts = [token_ids(seed, 700) for seed in (31, 32)]
    with client(server) as asking:
        asking.completions.create(
            model=NAME,
            prompt=prompts,
            n=2,
            max_tokens=1,
            extra_body={"vllm_xargs": {"sparse_prefill": "off"}},
        )
    assert grown("layer_tokens", path="sparse") == 0
    assert grown("layer_tokens", path="dense", reason="request_off") > 0


# Without a server

OFFLINE = """
import sys
from vllm import LLM, SamplingParams

llm = LLM(
    sys.argv[1],
    attention_backend="sparse_prefill",
    additional_config={"sparse_prefill": {"enabled": False}},
    skip_tokenizer_init=True,
    enforce_eager=True,
    max_model_len=4096,
)

def ask(value):
    extra_args = {"sparse_prefill": value, "session_id": "s"}
    given = dict(extra_args)
    params = SamplingParams(max_tokens=1, extra_args=extra_args, detokenize=False)
    try:
        llm.generate([{"prompt_token_ids": [5] * 300}] * 2, params, use_tqdm=False)
        print("took", value)
    except ValueError as error:
        print("refused", value, str(error))
    assert extra_args == given

for value in ("off", "on", {"threshold_scale": 2.0}, {"threshold_scale": "x"}):
    ask(value)
"""


def test_offline_what_is_wrong_is_a_value_error(tiny_llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tiny_llama)],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(("took", "refused"))]
    assert said[0] == "took off"
    for line in said[1:3]:
        assert "this server computes every request dense (enabled is false)" in line
    assert "threshold_scale: input should be a valid number, got 'x'" in said[3]
    assert len(said) == 4


STREAMING = """
import asyncio
import sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

def params(setting):
    return SamplingParams(
        max_tokens=2,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if setting is None else {"sparse_prefill": setting},
    )

async def inputs(settings):
    for number, setting in enumerate(settings):
        yield StreamingInput(tokens_input([5 + number] * 300), params(setting))

async def ask(engine, name, *settings):
    try:
        async for _ in engine.generate(inputs(settings), params(None), name):
            pass
        print(name, "took")
    except ValueError as error:
        print(name, "refused", error)

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        sys.argv[1],
        attention_backend="sparse_prefill",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=4096,
    ))
    await asyncio.gather(
        ask(engine, "same", "off", "off"),
        ask(engine, "other", "off", None),
        ask(engine, "default", None, "on", "threshold_scale=1"),
        ask(engine, "later", "on", "on", "threshold_scale=2"),
    )
    await ask(engine, "same", None)  # the name is another's now
    engine.shutdown()

asyncio.run(main())
"""


def test_a_streaming_session_stays_with_its_first_setting(tiny_llama: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STREAMING, str(tiny_llama)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = "default", "later", "other", "same"
    said = [line for line in done.stdout.splitlines() if line.startswith(names)]
    other, later = (
        f"refused sparse_prefill: want {first!r} in all inputs of a streaming session, as in its "
        f"first, got {then!r}"
        for first, then in (("off", "on"), ("on", "threshold_scale=2.0"))
    )
    wanted = ["default took", f"later {later}", f"other {other}", "same took", "same took"]
    assert sorted(said) == wanted
