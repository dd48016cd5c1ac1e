"""`vllm-sparse fit-gates`, from the text to the gates that a server follows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _attention import make_qkv, needs_core, plain
from _engine import Scenario, environment, generate
from _models import token_ids
from typer.testing import CliRunner

from vllm_sparse_backend.cli import app
from vllm_sparse_backend.fit_gates.fit import divergence, taught, untaught
from vllm_sparse_backend.fit_gates.lessons import Lesson, pooled_attention
from vllm_sparse_backend.selection import gates
from vllm_sparse_backend.selection.gates import Rotation

NONE = Rotation(torch.empty(0))


@pytest.mark.parametrize(("rows", "length"), [(640, 640), (128, 700), (704, 1100)])
def test_attention_is_pooled_by_blocks(rows: int, length: int) -> None:
    rows -= (length - rows) % 64  # steps begin at multiples of 64
    q, k, _ = make_qkv(0, rows, length, 4, 2, dtype=torch.float32)
    found = pooled_attention(q.transpose(0, 1), k.transpose(0, 1), 0.125)
    position = torch.arange(length)
    mask = position <= position[length - rows :, None]
    weight = plain(
        q.double(),
        k.double(),
        torch.eye(length, dtype=torch.float64)[:, None].expand(-1, 2, -1),
        mask,
        0.125,
    )  # [T, H, S]: attention over unit vectors are its weights
    for head in range(4):
        for at, begin in enumerate(range(0, rows, 64)):
            best = torch.stack(
                [
                    weight[begin : begin + 64, head, key : key + 64].max()
                    for key in range(0, length, 64)
                ]
            )
            torch.testing.assert_close(
                found[head, at].double(), best / best.sum(), atol=1e-6, rtol=1e-4
            )


def test_gates_learn_what_means_do_not_show() -> None:
    """Attention to the blocks whose largest key stands out in one channel, as queries ask for it
    in another."""
    g = torch.Generator().manual_seed(0)
    lessons = []
    for _ in range(4):
        queries = 0.3 * torch.randn(2, 24, 16, generator=g)
        keys = 0.3 * torch.randn(1, 24, 48, generator=g)
        strength = torch.randn(24, generator=g)
        keys[0, :, 3] = strength
        queries[0, :, 7] = 4
        logits = torch.stack((2 * strength.expand(24, -1), torch.zeros(24, 24)))
        later = torch.ones(24, 24, dtype=torch.bool).triu(1)
        lessons.append(Lesson(queries, keys, logits.masked_fill(later, -torch.inf).softmax(2)))
    start, steps = untaught(2, 16, NONE), []
    made = taught(start, lessons[:3], 300, 0, lambda: steps.append(1))
    assert len(steps) == 300
    before, after = divergence(start, lessons[3:]), divergence(made, lessons[3:])
    assert float(after[0]) < 0.5 * float(before[0])
    again = taught(start, lessons[:3], 300, 0, lambda: None)
    assert torch.equal(again.q, made.q) and torch.equal(again.k, made.k)


def test_untaught_gates_compare_means() -> None:
    its = untaught(2, 64, NONE)
    q, k, _ = make_qkv(0, 128, 128, 2, 1, dtype=torch.float32)
    queries = gates.pooled_queries(q.transpose(0, 1), 0, NONE)
    keys = gates.pooled_keys(k[:, 0], NONE)
    scores = its.logits(queries, keys[None])
    means = torch.stack([k[:64, 0].mean(0), k[64:, 0].mean(0)])
    exact = q.transpose(0, 1).unflatten(1, (2, 64)).mean(2) @ means.T / 8
    torch.testing.assert_close(scores[:, 1], exact[:, 1])
    assert scores[:, 0, 1].isneginf().all()


# The command


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for `tiny_llama`, whose words are w3 to w511."""
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{rng.randrange(3, 512)}" for _ in range(4500)))
    return path


def run(
    model: Path, text: Path, output: Path, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(Path(sys.executable).with_name("vllm-sparse")), "fit-gates", str(model),
            "--text", str(text), "--length", "1024", "--documents", "3", "--steps", "60",
            "-o", str(output), "--dtype", "float32", *more,
        ],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )  # fmt: skip


@needs_core
def test_gates_that_a_server_follows(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    more = {"VLLM_LOGGING_LEVEL": "INFO"}  # which is not to be in the JSON
    done = run(tiny_llama, words, path, "--json", "--chunk-tokens", "512", **more)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["output"] == str(path)
    assert [its["layer"] for its in summary["layers"]] == [0, 1]
    assert (summary["documents"], summary["heads"], summary["steps"]) == (2, 4, 60)
    assert summary["taught"] < summary["untaught"]
    assert "fit-gates: 100%" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["gates.safetensors"]
    loaded = gates.load(str(path), 1, summary["digest"])
    assert loaded.q.shape == (4, 64, 64) and loaded.k.shape == (4, 192, 64)
    # The model's: 10000 ** (-2i / 64).
    wanted = 10000.0 ** -(torch.arange(32) / 32)
    torch.testing.assert_close(loaded.rotation.frequencies, wanted, rtol=1e-4, atol=1e-7)

    policy = {"selector": "seer", "gates": str(path), "digest": summary["digest"]}
    config = {"min_prompt_tokens": 64, "policy": {**policy, "threshold": 0.1, "local": 64}}
    (result,) = generate(
        [Scenario(str(tiny_llama), [[token_ids(0, 2000)]], config=config)], tmp_path
    )
    assert len(result.answers[0][0].tokens) == 16
    assert 0 < result.tiles["computed"] < 0.9 * result.tiles["causal"]


@needs_core
@pytest.mark.all
def test_the_same_seed_gives_the_same_file(tiny_llama: Path, words: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        done = run(tiny_llama, words, path, "--chunk-tokens", "512")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "nats on text kept aside" in done.stdout
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_wrong_options_are_named(tiny_llama: Path, words: Path) -> None:
    runner = CliRunner()
    for more, said in (
        (["--chunk-tokens", "200"], "--chunk-tokens: want a multiple of 64, got 200"),
        (["--length", "9000"], "--length: the model has 8192 positions, got 9000"),
        (["--length", "4096", "--documents", "9"], "want 36855 tokens for 9 documents"),
    ):
        arguments = ["fit-gates", str(tiny_llama), "--text", str(words), *more]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert said in result.output
