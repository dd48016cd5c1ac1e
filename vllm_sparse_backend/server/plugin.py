"""vLLM's endpoint plugin: loaded in API servers alone, and only if ``VLLM_PLUGINS`` names it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_sparse_backend import compat_server
from vllm_sparse_backend.server.routes import router
from vllm_sparse_backend.server.source import Source, source_of


class LivePage:
    """Entry point of ``vllm.endpoint_plugins``, as vLLM's `EndpointPlugin` wants it."""

    name = "sparse_prefill"
    required_tasks = None  # whatever is prefilled can be sparse

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; with a key on the status where the server has one."""
        app.include_router(router(compat_server.key_check(app.state.args)))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Find out what is served. ``engine_client``: None on a server without an engine."""
        names = args.served_model_name or [args.model]
        state.sparse_prefill = (
            Source(why_not="this server has no engine")
            if engine_client is None
            else source_of(engine_client.vllm_config, names[0])
        )
