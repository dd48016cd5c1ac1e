"""A sparse server that stays, and lines to type that ask it something."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from vllm_sparse_backend.demo.plan import DEPTHS, RESERVE, Plan
from vllm_sparse_backend.demo.progress import note
from vllm_sparse_backend.demo.serve import Server
from vllm_sparse_backend.demo.text import ANSWER_TOKENS, build_document


def serve(plan: Plan, folder: Path, port: int) -> None:
    """Serve until interrupted (KeyboardInterrupt, then the server is ended) or until the server
    ends by itself (`ServerFailed`). Prints how to ask on stdout."""
    options = plan.setups[-1].options
    folder.mkdir(parents=True, exist_ok=True)
    request, answer = write_request(plan, folder)
    with Server("sparse", options, folder / "serve.log", port) as server:
        print(how_to_ask(server.url, request, answer), flush=True)
        note(f"log: {server.log}; Ctrl-C ends the server")
        server.wait()


def write_request(plan: Plan, folder: Path) -> tuple[Path, str]:
    """A completion request about a document as long as the server takes; the file, and the answer
    that is hidden in it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(plan.model)
    options = plan.setups[-1].options
    document = build_document(tokenizer, options.max_model_len - RESERVE, seed=1, depths=DEPTHS)
    needle = document.needles[-1]
    body = {
        "model": options.served_name,
        "prompt": document.prompt(tokenizer, needle),
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }
    path = folder / "request.json"
    path.write_text(json.dumps(body) + "\n", encoding="utf-8")
    return path, f"The {needle.name} is {needle.answer}."


def how_to_ask(url: str, request: Path, answer: str) -> str:
    """Lines for a shell."""
    header = "-H 'Content-Type: application/json'"
    data = f"-d @{shlex.quote(str(request.resolve()))}"
    return "\n".join(
        [
            f"# a long document (wanted: {answer})",
            f"curl -s {url}/v1/completions {header} {data}; echo",
            "# what ran sparsely",
            f"curl -s {url}/metrics | grep ^vllm:sparse_prefill",
        ]
    )
