"""Which requests a server takes: whether it can do what they ask of sparse prefill.

Made where requests come in, once per engine; what is asked is read in `control`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_sparse_backend import compat_connectors, compat_requests
from vllm_sparse_backend.backend import expect
from vllm_sparse_backend.backend.start import Setup, capabilities, resolve
from vllm_sparse_backend.control import DEFAULT, FIELD, OFF, ON, ControlError, Setting, asked
from vllm_sparse_backend.selection import scaled

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Admission:
    """Says of each request what it gets, or why it cannot have that."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        setup = resolve(vllm_config)
        self._enabled = setup.config.enabled
        self._why_dense = why_all_dense(setup, vllm_config)
        self._why_alike = compat_requests.why_untold(vllm_config) or compat_connectors.why_shared(
            vllm_config
        )
        policies = {setup.uniform} if setup.profile is None else setup.profile.kinds()
        self._scales = any(scaled(policy, 1.0) is not None for policy in policies)

    def __call__(self, extra_args: Mapping[str, Any] | None) -> Setting:
        """The setting of a request with these. Raises ControlError."""
        setting = asked(extra_args)
        if setting is None or (setting.off and not self._enabled):  # as it would be anyway
            return DEFAULT
        if not setting.off and self._why_dense is not None:
            raise ControlError(
                f"{FIELD}: want {OFF!r} or nothing, got {setting.text!r}: this server computes "
                f"every request dense ({self._why_dense})"
            )
        if setting != DEFAULT and self._why_alike is not None:
            raise ControlError(
                f"{FIELD}: want {ON!r} or nothing, got {setting.text!r}: {self._why_alike}"
            )
        if setting.threshold_scale != 1 and not self._scales:
            raise ControlError(
                f"{FIELD}: want {ON!r} or {OFF!r}, got {setting.text!r}: no policy of this "
                "server has a threshold above 0 to scale"
            )
        return setting


def why_all_dense(setup: Setup, vllm_config: VllmConfig) -> str | None:
    """Why no request of this server can be sparse; None: one can, as far as the model tells."""
    if not setup.config.enabled:
        return "enabled is false"
    reasons = expect.reasons(vllm_config, capabilities(setup.platform))
    if None not in reasons:
        return f"every layer is: {', '.join(sorted({str(reason) for reason in reasons}))}"
    longest, least = vllm_config.model_config.max_model_len, setup.config.min_prompt_tokens
    if longest < least:
        return f"max_model_len is {longest}, min_prompt_tokens {least}"
    return None
