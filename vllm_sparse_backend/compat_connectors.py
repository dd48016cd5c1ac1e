"""Which of vLLM's KV connectors keep requests of different cache salts apart.

The salt is where a request's setting goes (`control.salted`). A connector that looks keys and
values up by tokens alone would give a request what was computed under another setting. Seen with
vLLM 0.32, whose connectors 0.33 has under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MULTI = "MultiConnector"
# Known by their sources. Not here: ExampleConnector, HF3FSKVConnector and LMCacheConnectorV1, which
# hash tokens, and FlexKVConnectorV1, whose keys another package makes.
SALTED = frozenset(
    {
        # By vLLM's block hashes, of which the salt is a part.
        *("MooncakeStoreConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"),
        "LMCacheMPConnector",  # by tokens and salt
        # From one server's blocks of a request to another's of the same request.
        *("MooncakeConnector", "MoRIIOConnector"),
        *("NixlConnector", "NixlPullConnector", "NixlPushConnector"),
        # Nothing of another request is loaded.
        *("DecodeBenchConnector", "ExampleHiddenStatesConnector"),
    }
)


def why_shared(vllm_config: VllmConfig) -> str | None:
    """Why requests of different settings might share keys and values; None: they do not."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    name = _unsalted(
        transfer.kv_connector,
        transfer.kv_connector_module_path,
        transfer.kv_connector_extra_config,
    )
    if name is None:
        return None
    return f"the KV connector {name} is not known to keep settings apart"


def _unsalted(name: str, module: str | None, extra: Mapping[str, Any]) -> str | None:
    """The first connector, among these, that is not known to go by the salt."""
    if module:  # somebody else's, whatever its name
        return f"{module}.{name}"
    if name != MULTI:
        return None if name in SALTED else name
    found = (
        _unsalted(
            child["kv_connector"],
            child.get("kv_connector_module_path"),
            child.get("kv_connector_extra_config") or {},
        )
        for child in extra.get("connectors") or ()
    )
    return next((unsalted for unsalted in found if unsalted), None)
