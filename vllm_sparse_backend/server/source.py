"""Where the status comes from: what vLLM's configuration says, and the workers' counters."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sparse_backend import __version__, compat
from vllm_sparse_backend.backend import expect
from vllm_sparse_backend.backend.start import Setup, capabilities, resolve, warnings
from vllm_sparse_backend.config import session_directory
from vllm_sparse_backend.errors import SparsePrefillError
from vllm_sparse_backend.metrics import Totals, read_totals
from vllm_sparse_backend.server.status import Served, fill

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# However many look at the page, the counters are read and sent through JSON so often.
FRESH_SECONDS = 1.0


class Source:
    """The status of one API server's engine, as JSON."""

    def __init__(
        self,
        *,
        served: Served | None = None,
        why_not: str | None = None,
        directory: Path | None = None,
    ) -> None:
        self._served, self._why_not, self._directory = served, why_not, directory
        self._lock = threading.Lock()
        self._json, self._read_at = b"", float("-inf")

    def json(self) -> bytes:
        """A `Status`, at most `FRESH_SECONDS` old."""
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_SECONDS:
                totals = Totals() if self._directory is None else read_totals(self._directory)
                self._json = fill(self._served, self._why_not, totals).model_dump_json().encode()
                self._read_at = time.monotonic()
            return self._json


def source_of(vllm_config: VllmConfig, model: str) -> Source:
    """The source of the engine with this configuration; never raises for what is configured."""
    if not compat.is_selected(vllm_config):
        return Source(why_not="the server runs another --attention-backend")
    try:
        setup = resolve(vllm_config)
        served = _served(setup, vllm_config, model)
        reasons = expect.reasons(vllm_config, capabilities(setup.platform))
    except SparsePrefillError as error:
        # The server's first process resolved the same; its profile may be gone since.
        return Source(why_not=str(error), directory=session_directory())
    why_not = None
    if not setup.config.enabled:
        why_not = "switched off: enabled is false"
    elif None not in reasons:
        why_not = "every layer of this model is computed dense"
    return Source(served=served, why_not=why_not, directory=session_directory())


def _served(setup: Setup, vllm_config: VllmConfig, model: str) -> Served:
    labels = setup.labels()
    return Served(
        model=model,
        version=__version__,
        runs=setup.describe(),
        platform=setup.platform,
        isa=labels["isa"],
        profile=labels["profile"],
        digest=labels["digest"],
        shipped=setup.shipped,
        min_prompt_tokens=setup.config.min_prompt_tokens,
        min_query_tokens=setup.config.min_query_tokens,
        warnings=warnings(setup, vllm_config),
    )
