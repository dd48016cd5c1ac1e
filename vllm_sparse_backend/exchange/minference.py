"""MInference's pattern files: a JSON list of layers, each ``{head: [type, v, s, score]}``.

The types, as the released code (microsoft/MInference, 2025) computes them:

``stream_llm``, the A-shape: the first ``v`` keys, and of each row's past the last ``s``, its own
among them. This is ``static`` here. Ours counts the window from the q block and in whole tiles, so
both numbers go up to the next multiple of a tile, which is what would be computed in any case.

``vertical_and_slash``: the ``v`` columns and ``s`` diagonals with the most mass for the last 64
queries. ``block_sparse``: 100 blocks of 64 by pooled scores, whatever ``v`` and ``s``. Neither has
a selector here. A head that a layer does not list gets vertical_and_slash there, 1000 and 6096.

``score`` is from the search and read by nobody. There is no type for a dense head; an A-shape whose
window holds every context computes the same, and is written and read as that.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, TypeAdapter, ValidationError

from vllm_sparse_backend.errors import ProfileError, describe
from vllm_sparse_backend.exchange import Imported, Unsupported
from vllm_sparse_backend.profile import Calibration, ModelFacts, Profile
from vllm_sparse_backend.selection import DENSE, Policy, Static, keeps_all

TILE: Literal[16] = 16
LONGEST = 1 << 20  # of sink and window in a policy
EVERYTHING = 1 << 24  # a window that no context fills; written for dense heads
SCORE = 1.0

Kind = Literal["stream_llm", "vertical_and_slash", "block_sparse"]
_Size = Annotated[int, Strict(), Field(ge=0, le=1 << 31)]
_Head = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]
Pattern = tuple[Kind, _Size, _Size, float]
UNLISTED: Pattern = ("vertical_and_slash", 1000, 6096, 1.0)


_LAYERS: TypeAdapter[list[dict[str, Pattern]]] = TypeAdapter(list[dict[_Head, Pattern]])


def read(data: Any, facts: ModelFacts, name: str, unsupported: Unsupported) -> Imported:
    """The profile in a pattern file's contents. Raises ProfileError."""
    layers = _layers(data, facts)
    policies: dict[int, dict[int, Policy]] = {}
    missing: list[tuple[int, int, Pattern]] = []
    for layer, patterns in enumerate(layers):
        for head in range(facts.num_heads):
            pattern = patterns.get(str(head), UNLISTED)
            if pattern[0] != "stream_llm":
                missing.append((layer, head, pattern))
            elif policy := _static(pattern, layer, head):
                policies.setdefault(layer, {})[head] = policy
    total = facts.num_layers * facts.num_heads
    if missing and unsupported == "error":
        raise ProfileError(_without_selector(missing, total))
    static = sum(map(len, policies.values()))
    notes = [f"{static} of {total} heads static, {total - static} dense"]
    notes += [
        f"dense since there is no selector for them yet: {count} {kind}"
        for kind, count in Counter(pattern[0] for _, _, pattern in missing).items()
    ]
    profile = Profile.build(
        facts,
        policies,
        name=name[:200],
        defaults=DENSE,
        calibration=Calibration(note=f"imported from MInference's patterns: {'; '.join(notes)}"),
    )
    return Imported(profile, tuple(notes))


def write(profile: Profile) -> str:
    """The contents of a pattern file. Raises ProfileError for a head that it cannot say."""
    layers = []
    for layer in range(profile.model.num_layers):
        patterns = {}
        for head, policy in enumerate(profile.for_layer(layer)):
            if keeps_all(policy):
                patterns[str(head)] = ["stream_llm", TILE, EVERYTHING, SCORE]
            elif isinstance(policy, Static) and not policy.growth:
                # Of no tokens at all it would leave out the row's own.
                patterns[str(head)] = ["stream_llm", policy.sink, max(1, policy.local), SCORE]
            else:
                grows = " with a window that grows" if isinstance(policy, Static) else ""
                raise ProfileError(
                    f"layer {layer}, head {head}: {policy.selector}{grows} has no pattern in "
                    "MInference; want static or dense heads only"
                )
        layers.append(patterns)
    return json.dumps(layers) + "\n"


def _layers(data: Any, facts: ModelFacts) -> list[dict[str, Pattern]]:
    if not isinstance(data, list):
        raise ProfileError(f"want a list of layers, got {type(data).__name__}")
    if len(data) != facts.num_layers:
        raise ProfileError(
            f"layers: the file has {len(data)}, {facts.architecture} {facts.num_layers}"
        )
    try:
        layers = _LAYERS.validate_python(data)
    except ValidationError as error:
        raise ProfileError(describe(error)) from None
    for layer, patterns in enumerate(layers):
        for head in patterns:
            if int(head) >= facts.num_heads:
                raise ProfileError(
                    f"layer {layer}, head {head}: the model has heads 0 to {facts.num_heads - 1}"
                )
    return layers


def _static(pattern: Pattern, layer: int, head: int) -> Static | None:
    """None: it leaves nothing out."""
    _, sink, window, _ = pattern
    if window == 0:
        raise ProfileError(f"layer {layer}, head {head}: want a window of 1 token or more, got 0")
    if max(sink, window) > LONGEST:
        return None
    return Static(sink=max(TILE, _tiles(sink)), local=_tiles(window - 1), tile=TILE)


def _tiles(tokens: int) -> int:
    return -(-tokens // TILE) * TILE


def _without_selector(missing: list[tuple[int, int, Pattern]], total: int) -> str:
    layer, head, (kind, v, s, _) = missing[0]
    counts = Counter(pattern[0] for _, _, pattern in missing)
    counted = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return (
        f"layer {layer}, head {head} wants {kind} ({v}, {s}), for which there is no selector here "
        f"yet; so do {len(missing)} of {total} heads ({counted}). Nothing was written; "
        "--unsupported dense makes them dense"
    )
