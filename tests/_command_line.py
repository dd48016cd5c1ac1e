"""Command lines of `vllm serve`, read by vLLM's own parser and by our configuration."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm_sparse_backend.config import (
    ENV_PREFIX,
    SparseConfig,
    environment_names,
    load_config,
)

# Read by those who start vLLM, who made up the name: KServe's base configurations.
OF_OTHERS = {"VLLM_ADDITIONAL_ARGS"}


@dataclass(frozen=True)
class Served:
    """What a command line asks of `vllm serve`."""

    arguments: Any  # vLLM's namespace
    config: SparseConfig  # of the line and its environment

    @property
    def sparse(self) -> bool:
        """Whether it asks for this backend."""
        return str(self.arguments.attention_backend).lower() == "sparse_prefill"


@cache
def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    # Options in full: what a short form stands for changes with every new option.
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve", allow_abbrev=False))


def read_serve(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Served:
    """What follows `vllm serve`. Raises ValueError, or ConfigError, with the parser's own words."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = _parser().parse_args(list(arguments))
            validate_parsed_serve_args(parsed)
    except SystemExit:
        raise ValueError(said.getvalue().rpartition("error: ")[2].strip()) from None
    if (backend := parsed.attention_backend) is not None:  # looked up when an engine is made
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if backend.upper() not in AttentionBackendEnum.__members__:
            raise ValueError(f"vllm serve: no attention backend is called {backend}")
    additional = parsed.additional_config
    if isinstance(additional, str):
        additional = json.loads(additional)
    ours = {k: v for k, v in (environment or {}).items() if k.startswith(ENV_PREFIX)}
    return Served(parsed, load_config(additional, ours))


def unknown_variables(names: Mapping[str, str] | Sequence[str]) -> list[str]:
    """Those that begin with VLLM_ and that neither vLLM nor we read."""
    from vllm import envs

    known = {*envs.environment_variables, *environment_names(), *OF_OTHERS}
    return sorted(name for name in names if name.startswith("VLLM_") and name not in known)
