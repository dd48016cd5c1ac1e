"""The page: one document with its style and script inside, and a policy that allows no others."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from vllm_sparse_backend import __version__
from vllm_sparse_backend.report.template import environment

FOLDER = Path(__file__).parent
POLL_SECONDS = 2
WINDOW_SECONDS = 60


class Page:
    """The document and the headers it is sent with; the same for everybody, without data."""

    def __init__(self) -> None:
        style, script = (FOLDER / name for name in ("page.css", "page.js"))
        texts = [file.read_text(encoding="utf-8") for file in (style, script)]
        self.html: str = (
            environment(FOLDER)
            .get_template("page.html.j2")
            .render(
                style=texts[0],
                script=texts[1],
                version=__version__,
                poll_seconds=POLL_SECONDS,
                window_seconds=WINDOW_SECONDS,
            )
        )
        policy = {
            "default-src": "'none'",
            "style-src": _digest(texts[0]),
            "script-src": _digest(texts[1]),
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self.headers = {
            "Content-Security-Policy": "; ".join(f"{name} {what}" for name, what in policy.items()),
            "X-Frame-Options": "DENY",
        }


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
