"""MInference's pattern files: a JSON list of layers, each ``{head: [type, v, s, score]}``.

The types, as the released code (microsoft/MInference, 2025) computes them:

``stream_llm``, the A-shape: the first ``v`` keys, and of each row's past the last ``s``, its own
among them. This is ``static`` here. Ours counts the window from the q block and in whole tiles, so
both numbers go up to the next multiple of a tile, which is what would be computed in any case.

``vertical_and_slash``: the ``v`` columns and ``s`` diagonals with the most mass for the last 64
queries, 30 columns and 100 diagonals at least: ``vertical_slash`` here. A head that a layer does
not list gets it with 1000 and 6096. ``block_sparse``: 100 blocks of 64 by pooled scores, whatever
``v`` and ``s``: ``block_topk``. Both with as little of a window as a policy can have, since theirs
have none of their own.

``score`` is from the search and read by nobody. There is no type for a dense head; an A-shape whose
window holds every context computes the same, and is written and read as that.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, TypeAdapter, ValidationError

from vllm_sparse_backend.errors import ProfileError, describe
from vllm_sparse_backend.exchange import Imported
from vllm_sparse_backend.profile import Calibration, ModelFacts, Profile
from vllm_sparse_backend.selection import (
    DENSE,
    ListSelector,
    Policy,
    Static,
    keeps_all,
    parse_policy,
)

TILE: Literal[16] = 16
LONGEST = 1 << 20  # of sink and window in a policy
EVERYTHING = 1 << 24  # a window that no context fills; written for dense heads
SCORE = 1.0
FORCED_COLUMNS, FORCED_DIAGONALS = 30, 100  # of vertical_and_slash, whatever it says

Kind = Literal["stream_llm", "vertical_and_slash", "block_sparse"]
_Size = Annotated[int, Strict(), Field(ge=0, le=1 << 31)]
_Head = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]
Pattern = tuple[Kind, _Size, _Size, float]
UNLISTED: Pattern = ("vertical_and_slash", 1000, 6096, 1.0)


_LAYERS: TypeAdapter[list[dict[str, Pattern]]] = TypeAdapter(list[dict[_Head, Pattern]])


def read(data: Any, facts: ModelFacts, name: str) -> Imported:
    """The profile in a pattern file's contents. Raises ProfileError."""
    policies: dict[int, dict[int, Policy]] = {}
    for layer, patterns in enumerate(_layers(data, facts)):
        policies[layer] = {
            head: _policy(patterns.get(str(head), UNLISTED), layer, head)
            for head in range(facts.num_heads)
        }
    every = [policy for heads in policies.values() for policy in heads.values()]
    counts = Counter(policy.selector for policy in every)
    said = ", ".join(f"{counts[selector]} {selector}" for selector in sorted(counts))
    notes = [f"of {len(every)} heads: {said}"]
    if listed := sum(isinstance(policy, ListSelector) for policy in every):
        notes.append(f"{listed} of them follow list selectors, which choose in torch")
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
            pattern = _pattern(policy)
            if pattern is None:
                raise ProfileError(
                    f"layer {layer}, head {head}: {policy.selector} has no pattern in MInference "
                    "that computes the same; want dense, static that does not grow, or what "
                    f"import makes of its other patterns, got {policy!r}"
                )
            patterns[str(head)] = pattern
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


def _policy(pattern: Pattern, layer: int, head: int) -> Policy:
    kind, first, second, _ = pattern
    if kind == "block_sparse":
        return _bare("block_topk")
    if kind == "vertical_and_slash":
        columns, diagonals = max(first, FORCED_COLUMNS), max(second, FORCED_DIAGONALS)
        if max(columns, diagonals) > LONGEST:
            return DENSE
        return _bare("vertical_slash", columns=columns, diagonals=diagonals)
    if second == 0:
        raise ProfileError(f"layer {layer}, head {head}: want a window of 1 token or more, got 0")
    if max(first, second) > LONGEST:
        return DENSE
    return Static(sink=max(TILE, _tiles(first)), local=_tiles(second - 1), tile=TILE)


def _bare(selector: str, **fields: int) -> Policy:
    """With no more of a window than every policy has. By name: its module wants torch."""
    return parse_policy({"selector": selector, "sink": TILE, "local": 0, **fields})


def _pattern(policy: Policy) -> Pattern | None:
    """None: there is none that computes the same."""
    if keeps_all(policy):
        return "stream_llm", TILE, EVERYTHING, SCORE
    if isinstance(policy, Static) and not policy.growth:
        # A window of no tokens at all would leave out the row's own.
        return "stream_llm", policy.sink, max(1, policy.local), SCORE
    if policy.selector == "block_topk" and policy == _bare("block_topk"):
        return "block_sparse", 0, 0, SCORE
    if policy.selector == "vertical_slash":
        its = policy.model_dump(include={"columns", "diagonals"})
        if policy == _bare("vertical_slash", **its):
            return "vertical_and_slash", its["columns"], its["diagonals"], SCORE
    return None


def _tiles(tokens: int) -> int:
    return -(-tokens // TILE) * TILE
