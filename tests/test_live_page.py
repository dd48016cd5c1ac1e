"""The live page on a server as a user runs it, and that dashboards find what they ask for."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from _attention import needs_core
from _models import token_ids
from _monitoring import BY_PROMETHEUS, OF_TARGETS, queries, selectors
from _server import OURS, Server, counted, serve
from fastapi import FastAPI

from vllm_sparse_backend.demo.serve import free_port
from vllm_sparse_backend.metrics import Counters
from vllm_sparse_backend.server.plugin import LivePage
from vllm_sparse_backend.server.source import Source
from vllm_sparse_backend.server.status import Served, Status

pytestmark = needs_core

KEY = "none"  # what `Server.ask` says
SECTION: dict[str, Any] = {
    "min_prompt_tokens": 512,
    "dense_core": False,
    "policy": {"selector": "static", "sink": 64, "local": 64},
}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--max-num-batched-tokens", "1024", "--api-key", KEY]
    folder = tmp_path_factory.mktemp("live")
    with serve(tiny_llama, SECTION, folder, *options, VLLM_PLUGINS="sparse_prefill") as started:
        yield started


def get(server: Server, path: str, key: str | None = KEY) -> tuple[int, str, Any]:
    """Status, body and headers of an answer."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def status_of(server: Server) -> Status:
    code, body, _ = get(server, "/sparse_prefill/status")
    assert code == 200, body
    return Status.model_validate_json(body)


def test_the_status_follows_what_runs(server: Server) -> None:
    before = status_of(server)
    assert before.active and before.workers == 1 and before.served is not None
    assert before.served.model == "tiny" and before.served.min_prompt_tokens == 512
    server.ask(token_ids(3, 3000))
    time.sleep(1.1)  # it may be as old as a second
    after = status_of(server)
    assert after.tiles.causal > before.tiles.causal
    assert after.heads.layers == 2 and after.heads.heads == 4
    assert all(density is not None and density < 0.5 for density in after.heads.density)
    assert after.seconds is not None and after.seconds.dense_estimate > 0
    samples = server.metrics()
    for layer in range(2):
        for kind, heads in (("computed", after.heads.computed), ("causal", after.heads.causal)):
            of_layer = counted(samples, "layer_tiles", layer=str(layer), kind=kind)
            assert of_layer == sum(heads[layer]) > 0
    # No request keeps all of its tiles, so that all that the core did was of sparse ones.
    assert counted(samples, "tiles", kind="computed") == after.tiles.computed
    assert after.tiles.computed == sum(map(sum, after.heads.computed))
    for path in after.paths:
        labels = {"path": path.path, "reason": path.reason}
        assert counted(samples, "layer_tokens", **labels) == path.layer_tokens
        assert counted(samples, "layer_decisions", **labels) == path.layer_decisions > 0
    assert counted(samples, "layer_tokens") == sum(path.layer_tokens for path in after.paths)


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x", "\u00e9"])
def test_the_status_is_behind_the_servers_key(server: Server, key: str | None) -> None:
    for path in ("/sparse_prefill/status", "/v1/models"):
        code, body, _ = get(server, path, key)
        assert (code, json.loads(body)) == (401, {"error": "Unauthorized"}), path
        assert "causal" not in body
    assert get(server, "/sparse_prefill/", key)[0] == 200


def test_the_page_holds_nothing_of_the_server(server: Server) -> None:
    code, body, headers = get(server, "/sparse_prefill/", None)
    assert code == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "tiny" not in body and str(server.folder) not in body


def test_fuzzed(server: Server) -> None:
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", "--no-color"),
            f"http://127.0.0.1:{server.port}/openapi.json",
            *("--include-path-regex", "^/sparse_prefill/", "--max-examples", "30", "--seed", "1"),
            *("--header", f"Authorization: Bearer {KEY}", "--generation-database", "none"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 2" in done.stdout


@pytest.mark.parametrize(
    ("method", "path", "want"),
    [
        ("POST", "/sparse_prefill/status", {405}),
        ("DELETE", "/sparse_prefill/", {405}),
        ("GET", "/sparse_prefill/status/", {307, 404}),
        ("GET", "/sparse_prefill/../sparse_prefill/none", {404}),
        ("GET", "/sparse_prefill/%00", {404}),
        ("GET", "/sparse_prefill/" + "a" * 4000, {404}),
        ("GET", "/sparse_prefill/page.html.j2", {404}),
        ("GET", "/sparse_prefill/status?x=" + "%ff" * 500, {200}),
    ],
)
def test_what_nobody_should_ask(server: Server, method: str, path: str, want: set[int]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, headers={"Authorization": f"Bearer {KEY}"})
    answer = connection.getresponse()
    assert answer.status in want, answer.read()
    connection.close()


def test_all_that_dashboard_and_alerts_ask_for_is_exported(server: Server) -> None:
    server.ask(token_ids(4, 1000))
    exported: dict[str, list[dict[str, str]]] = {}
    for name, pairs in server.metrics():
        exported.setdefault(name, []).append(dict(pairs))
    # Of a profile's calibration, which no profile of a test's model has; test_metrics.py has it.
    exported.setdefault(f"{OURS}profile_density", [{"tokens": "1"}])
    for who, expression in queries().items():
        for metric, labels in selectors(expression):
            if metric in BY_PROMETHEUS:
                continue
            assert metric in exported, f"{who}: nothing exports {metric}"
            wanted = {label: value for label, value in labels.items() if label not in OF_TARGETS}
            if wanted.get("status") == "5xx":  # there is none, but such a label
                wanted["status"] = ""
            assert any(
                all(label in has and value in ("", has[label]) for label, value in wanted.items())
                for has in exported[metric]
            ), f"{who}: {metric} has no {wanted}"


@contextmanager
def browser(scheme: str) -> Iterator[Any]:
    """A page of a real Chromium that fails on any error and on any address but this machine's."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium (Debian: chromium)")
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        # Without a sandbox of its own, which root may not have.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 1500})
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
        page.on("request", lambda r: said.extend([] if "://127.0.0.1:" in r.url else [r.url]))
        yield page
        chromium.close()
    # Chromium itself logs the answers with status 401.
    assert [line for line in said if "401" not in line] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(server: Server, tmp_path: Path, scheme: str) -> None:
    with browser(scheme) as page:
        page.goto(f"http://127.0.0.1:{server.port}/sparse_prefill")
        page.wait_for_selector("#key:not([hidden])")
        assert not page.is_visible("#main")
        page.fill("#token", "wrong")
        page.click("#key button")
        page.wait_for_selector("#state.bad")
        page.fill("#token", KEY)
        page.click("#key button")
        page.wait_for_selector("#main:not([hidden])")
        assert not page.is_visible("#key")
        before = page.text_content("#paths") or ""
        asking = threading.Thread(target=server.ask, args=(token_ids(7, 4000),))
        asking.start()
        page.wait_for_function(
            "before => document.querySelector('#paths').textContent !== before", arg=before
        )
        asking.join()
        assert "1 worker" in page.text_content("#state")
        size = page.evaluate("() => [window.map.width, window.map.height]")
        assert size == [2, 4]
        page.focus("#map")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert page.text_content("#cell").startswith("layer 1, head 0: density 0.")
        page.reload()  # the key is kept in the tab
        page.wait_for_selector("#main:not([hidden])")
        assert page.screenshot(path=str(tmp_path / "page.png"), full_page=True)


def test_a_thousand_layers_in_a_browser(tmp_path: Path) -> None:
    own = Counters(tmp_path, ["decode"], {"isa": "avx2"}, shape=(1000, 128))
    cells = np.arange(128000)
    own.add_tiles(1, cells, np.full(128000, 10**6))
    own.add_tiles(0, cells, cells * 7)
    app = FastAPI()
    app.state.args = Namespace(api_key=[])
    LivePage().attach_router(app)
    told: dict[str, Any] = {
        "model": "<b>m</b>",
        "version": "0",
        "runs": "r",
        "platform": "cpu",
        "isa": "avx2",
    }
    told |= {"min_prompt_tokens": 1, "min_query_tokens": 1}
    served = Served(profile='"<script>', digest="", shipped=False, warnings=["<i>w</i>"], **told)
    app.state.sparse_prefill = Source(served=served, directory=tmp_path)
    port = free_port()
    run = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=run.run)
    thread.start()
    try:
        with browser("light") as page:
            begin = time.monotonic()
            page.goto(f"http://127.0.0.1:{port}/sparse_prefill/")
            page.wait_for_function("() => window.map.width === 1000 && window.map.height === 128")
            assert time.monotonic() - begin < 10
            # Text of the server stays text.
            assert page.text_content("#model") == "<b>m</b>"
            assert page.inner_text("#warnings") == "<i>w</i>"
            page.click("#details summary")
            page.wait_for_function("() => document.querySelector('#layers').children.length > 999")
    finally:
        run.should_exit = True
        thread.join()
