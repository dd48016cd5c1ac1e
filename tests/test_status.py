"""The live page and its data without a server of vLLM's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from _batch import engine_config
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from vllm_sparse_backend.backend.plan import DenseReason
from vllm_sparse_backend.compat_server import key_check
from vllm_sparse_backend.metrics import Counters, Totals, read_totals
from vllm_sparse_backend.metrics.counters import (
    ATTEND,
    CAUSAL,
    COMPUTED,
    DENSE_ESTIMATE,
    KEPT,
    SELECT,
    SPARSE,
    decisions,
    dense,
)
from vllm_sparse_backend.server.page import Page
from vllm_sparse_backend.server.plugin import LivePage
from vllm_sparse_backend.server.source import Source, source_of
from vllm_sparse_backend.server.status import MEANINGS, Status, fill

REASONS = [str(reason) for reason in DenseReason]


def counted(directory: Path, shape: tuple[int, int] = (2, 2)) -> Counters:
    own = Counters(directory, REASONS, {"isa": "avx2"}, shape=shape, expected={"4096": 0.4})
    for key, tokens, requests in ((SPARSE, 60, 2), (KEPT, 10, 1), (dense("decode"), 30, 30)):
        own.add(key, tokens)
        own.add(decisions(key), requests)
    for key, amount in ((COMPUTED, 30), (CAUSAL, 100), (SELECT, 1), (ATTEND, 2)):
        own.add(key, amount)
    own.add(DENSE_ESTIMATE, 9)
    own.add_tiles(0, np.arange(2), np.array([3, 4]))
    own.add_tiles(1, np.arange(2), np.array([10, 18]))
    return own


def test_every_reason_is_explained() -> None:
    assert set(MEANINGS) == {"", *REASONS}


def test_a_status_of_what_was_counted(tmp_path: Path) -> None:
    counted(tmp_path)
    (tmp_path / "broken.counters").write_text("")
    status = fill(None, None, read_totals(tmp_path))
    assert status.active and status.workers == 1 and status.unreadable == 1
    paths = [(p.path, p.reason, p.layer_tokens, p.layer_decisions) for p in status.paths]
    assert paths == [
        ("sparse", "", 60, 2), ("dense", "decode", 30, 30), ("keep_all", "short_context", 10, 1),
    ]  # fmt: skip
    assert all(path.meaning for path in status.paths)
    assert status.tiles.density == 0.3
    assert status.heads.computed == [[3, 4], [0, 0]]
    assert status.heads.causal == [[10, 18], [0, 0]]
    assert status.heads.density == [0.25, None]
    assert status.seconds is not None and status.seconds.saved == 6
    assert [(e.tokens, e.density) for e in status.expected] == [(4096, 0.4)]
    assert Status.model_validate_json(status.model_dump_json()) == status


def test_a_status_before_anything_ran(tmp_path: Path) -> None:
    for totals in (Totals(), read_totals(tmp_path)):
        status = fill(None, "because", totals)
        assert not status.active and status.why_not == "because"
        assert status.paths == [] and status.seconds is None and status.tiles.density is None
        assert status.heads.density == []


def test_counters_are_not_read_for_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = counted(tmp_path)
    source = Source(directory=tmp_path)
    first = source.json()
    own.add(SPARSE, 1)
    assert source.json() == first
    later = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert source.json() != first


def test_a_thousand_layers_and_heads_are_told_in_time(tmp_path: Path) -> None:
    own = counted(tmp_path, (1000, 128))
    cells = np.arange(1000 * 128)
    own.add_tiles(1, cells, np.full(len(cells), 10**9))
    begin = time.perf_counter()
    text = Source(directory=tmp_path).json()
    assert time.perf_counter() - begin < 2.0
    status = json.loads(text)
    assert status["heads"]["layers"] == 1000 and len(status["heads"]["causal"][999]) == 128
    assert len(text) < 3 << 20


@pytest.mark.parametrize(
    ("section", "engine", "why_not"),
    [
        ({}, {}, None),
        ({"enabled": False}, {}, "switched off"),
        ({}, {"attention_backend": "CPU_ATTN"}, "another --attention-backend"),
    ],
)
def test_why_nothing_is_sparse(
    tiny_llama: Path, section: dict[str, object], engine: dict[str, str], why_not: str | None
) -> None:
    source = source_of(engine_config(tiny_llama, section, **engine), "tiny")
    status = Status.model_validate_json(source.json())
    assert status.active == (why_not is None)
    assert (status.why_not is None) if why_not is None else (why_not in str(status.why_not))
    if engine:
        assert status.served is None
    else:
        assert status.served is not None
        assert status.served.model == "tiny" and status.served.profile == "uniform"


def test_a_profile_that_is_gone_is_no_reason_to_end(tiny_llama: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    model = {"architecture": "LlamaForCausalLM", "num_layers": 2, "num_heads": 4}
    model |= {"num_kv_heads": 2, "head_dim": 64}
    profile.write_text(json.dumps({"format": "vllm-sparse-profile", "version": 1, "model": model}))
    config = engine_config(tiny_llama, {"profile": str(profile)})
    profile.unlink()
    status = Status.model_validate_json(source_of(config, "tiny").json())
    assert not status.active and str(profile) in str(status.why_not)


def test_the_page_allows_its_own_script_and_style_and_nothing_else() -> None:
    page = Page()
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    # Nothing from elsewhere, no handlers or styles in attributes, and no text taken for HTML.
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page.html)
    assert not re.search(r"<[^>]+\s(style|on\w+)\s*=", page.html)
    assert "innerHTML" not in page.html and "eval(" not in page.html


def test_the_key_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key_check(Namespace(api_key=None)) is None
    assert key_check(Namespace(api_key=[])) is None
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    by_environment = key_check(Namespace(api_key=None))
    assert by_environment is not None
    assert by_environment(Headers({"Authorization": "Bearer of the environment"}))
    check = key_check(Namespace(api_key=["one", "two"]))
    assert check is not None
    assert check(Headers({"authorization": "bearer two"}))
    for wrong in ({}, {"Authorization": "two"}, {"Authorization": "Bearer two "}):
        assert not check(Headers(wrong))


def client(tmp_path: Path, *keys: str) -> TestClient:
    app = FastAPI()
    app.state.args = Namespace(api_key=list(keys))
    LivePage().attach_router(app)
    counted(tmp_path)
    app.state.sparse_prefill = Source(directory=tmp_path)
    return TestClient(app)


def test_the_routes_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    asked = client(tmp_path)
    page = asked.get("/sparse_prefill")
    assert page.status_code == 200 and page.url.path == "/sparse_prefill/"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-frame-options"] == "DENY"
    status = asked.get("/sparse_prefill/status")
    assert Status.model_validate_json(status.content).workers == 1
    for answer in (page, status):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    schema = asked.get("/openapi.json").json()
    assert "security" not in schema["paths"]["/sparse_prefill/status"]["get"]


def test_the_status_wants_the_key_and_the_page_does_not(tmp_path: Path) -> None:
    asked = client(tmp_path, "sesame")
    assert asked.get("/sparse_prefill/").status_code == 200
    refused = asked.get("/sparse_prefill/status")
    assert refused.status_code == 401 and refused.json() == {"error": "Unauthorized"}
    assert refused.headers["www-authenticate"] == "Bearer"
    answer = asked.get("/sparse_prefill/status", headers={"Authorization": "Bearer sesame"})
    assert answer.status_code == 200
    operation = asked.get("/openapi.json").json()["paths"]["/sparse_prefill/status"]["get"]
    assert operation["security"] == [{"HTTPBearer": []}]


def test_a_server_without_an_engine() -> None:
    import asyncio

    state, args = Namespace(), Namespace(served_model_name=None, model="folder")
    asyncio.run(LivePage().init_state(None, state, args))
    status = Status.model_validate_json(state.sparse_prefill.json())
    assert status.why_not == "this server has no engine" and status.served is None
