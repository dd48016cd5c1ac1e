"""The page and its data as FastAPI routes."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer

from vllm_sparse_backend.compat_server import KeyCheck
from vllm_sparse_backend.server.page import Page
from vllm_sparse_backend.server.source import Source
from vllm_sparse_backend.server.status import Status, Unauthorized

PREFIX = "/sparse_prefill"
# For whatever a browser is made to do with an answer of ours.
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def router(has_key: KeyCheck | None) -> APIRouter:
    """The routes. ``has_key``: whether a request has the server's API key; None: there is none.

    vLLM asks for the key under /v1 and the like only. The page itself holds nothing of the server
    and is free, or there would be no way to enter a key.
    """
    routes = APIRouter(prefix=PREFIX, tags=["sparse_prefill"])
    page = Page()

    @routes.get("/", response_class=HTMLResponse, summary="The live page")
    def live_page() -> HTMLResponse:
        """What is sparse, of which heads and why not, while requests run."""
        return HTMLResponse(page.html, headers={**HEADERS, **page.headers})

    @routes.get(
        "/status",
        response_model=Status,
        responses={} if has_key is None else {401: {"model": Unauthorized}},
        dependencies=[] if has_key is None else [Depends(HTTPBearer(auto_error=False))],
        summary="What is sparse",
    )
    def status(request: Request) -> Response:
        """Counters of all workers on this machine since the server's start, and what is served."""
        if has_key is not None and not has_key(request.headers):
            refused = Unauthorized(error="Unauthorized")  # as vLLM's own answer
            return JSONResponse(
                refused.model_dump(), 401, {**HEADERS, "WWW-Authenticate": "Bearer"}
            )
        source: Source = request.app.state.sparse_prefill
        return Response(source.json(), media_type="application/json", headers=HEADERS)

    return routes
