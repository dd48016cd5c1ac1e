"""Profiles of all kinds come back as they were, and of wrong ones the field is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_sparse_backend.errors import SHOWN, ProfileError
from vllm_sparse_backend.profile import Calibration, ModelFacts, Profile, load_profile, schema
from vllm_sparse_backend.selection import AnyPolicy, Dense, Mass, Sale, Static
from vllm_sparse_backend.selection.block_topk import BlockTopK
from vllm_sparse_backend.selection.s2 import Strided
from vllm_sparse_backend.selection.vertical_slash import VerticalSlash

VALIDATOR = jsonschema.Draft202012Validator(schema())
UNHURRIED = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=300)

SHARE = st.floats(0, 1)
TOKENS = st.integers(0, 1 << 20)
WINDOWED: dict[str, Any] = {
    "sink": st.integers(1, 1 << 20), "local": TOKENS, "growth": SHARE,
    "tile": st.sampled_from([16, 32, 64]),
}  # fmt: skip
SCORED: dict[str, Any] = {
    **WINDOWED, "tau": SHARE, "tau_slope": st.floats(-2, 2), "tail": TOKENS,
    "bits": st.sampled_from(get_args(Sale.model_fields["bits"].annotation)),
    "row_stride": st.sampled_from([1, 2, 4, 8]),
}  # fmt: skip
POLICIES: st.SearchStrategy[AnyPolicy] = st.one_of(
    st.just(Dense()),
    st.builds(Static, **WINDOWED),
    st.builds(Sale, **SCORED),
    st.builds(Mass, **SCORED),
    st.builds(BlockTopK, blocks=st.integers(1, 1 << 16)),
    st.builds(Strided, stride=st.integers(2, 1 << 16)),
    st.builds(VerticalSlash, columns=st.integers(30, 1 << 20), diagonals=st.integers(100, 1 << 20)),
)
COUNT = st.integers(1, 1 << 16)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FACTS = st.builds(
    ModelFacts,
    architecture=TEXT.filter(bool), num_layers=COUNT, num_heads=COUNT, num_kv_heads=COUNT,
    head_dim=COUNT, digest=st.none() | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True),
)  # fmt: skip
CALIBRATIONS = st.builds(
    Calibration,
    texts=st.lists(TEXT, max_size=2), lengths=st.lists(st.integers(1), max_size=2),
    error_budget=st.none() | SHARE, seed=st.none() | st.integers(), note=st.none() | TEXT,
    figures=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)  # fmt: skip
NUMBERS = st.integers(0, 99_999).map(str)
PROFILES = st.builds(
    Profile.build,
    FACTS,
    st.dictionaries(
        NUMBERS, st.dictionaries(NUMBERS | st.just("*"), POLICIES, max_size=3), max_size=3
    ),
    name=TEXT, defaults=POLICIES, calibration=st.none() | CALIBRATIONS,
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@UNHURRIED
@given(PROFILES)
def test_a_profile_comes_back_as_it_was(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "p.json"
    profile.save(path)
    again = load_profile(path)
    assert again == (profile if profile.name else profile.model_copy(update={"name": "p"}))
    assert again.digest == profile.digest
    VALIDATOR.validate(json.loads(path.read_text()))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every object, list and value in it."""
    found = [path]
    inside = list(value.items()) if isinstance(value, dict) else []
    for key, its in list(enumerate(value)) if isinstance(value, list) else inside:
        found += _places(its, (*path, key))
    return found


def _mutated(draw: st.DrawFn, whole: Any) -> tuple[Any, list[str]]:
    """One place of it replaced, removed or added to, and the names that stand for it."""
    path = draw(st.sampled_from(_places(whole)))
    whole, parents = copy.deepcopy(whole), []
    at = whole
    for key in path:
        parents.append(at)
        at = at[key]
    how = draw(st.sampled_from(["replace", "remove", "add"]))
    if how == "add" and isinstance(at, dict):
        key = draw(TEXT)
        at[key] = draw(JSON)
        return whole, [key, *map(str, path)]
    if not path:
        return draw(JSON), []
    if how == "remove":
        del parents[-1][path[-1]]
    else:
        parents[-1][path[-1]] = draw(JSON)
    return whole, [str(key) for key in path]


@UNHURRIED
@given(PROFILES, st.data())
def test_of_a_wrong_profile_the_field_is_named(
    tmp_path: Path, profile: Profile, data: st.DataObject
) -> None:
    right = json.loads(profile.model_dump_json(exclude_none=True))
    wrong, names = data.draw(st.composite(_mutated)(right))
    path = tmp_path / "p.json"
    path.write_text(json.dumps(wrong))
    try:
        loaded = load_profile(path)
    except ProfileError as error:
        said = str(error).removeprefix(f"profile {path}: ")
        assert said and "\n" not in said and said.count(";") < 20 * SHOWN
        # What is wrong below a list or a policy is said of that.
        assert not names or any(name in said for name in names), (said, names)
        return
    # It was another right one, or as good as one: a number with choices takes `true` for 1.
    loaded.save(path)
    VALIDATOR.validate(json.loads(path.read_text()))
    assert load_profile(path) == loaded
