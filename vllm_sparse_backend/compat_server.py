"""What the live page needs of vLLM's API server. Imports vLLM only inside its functions.

Seen with vLLM 0.32. vLLM's middleware asks for the API key under certain prefixes only, of which
a plugin's routes are none: they have to ask by themselves, in the same way.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, TypeAlias

KeyCheck: TypeAlias = Callable[[Any], bool]  # of a request's headers (starlette's)


def key_check(args: Namespace) -> KeyCheck | None:
    """Whether a request's headers hold the API key of the server with these arguments.

    None: the server has no key. In vLLM's own words, so that what opens /v1 opens this.
    """
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not keys:
        return None

    async def nothing(*_: Any) -> None:
        """Of the middleware, the check alone is wanted."""

    return AuthenticationMiddleware(nothing, keys).verify_token
