"""List selectors by name: whose they are, what cannot be used, and which names are taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _attention import make_qkv
from _selectors import forget, install
from pydantic import ValidationError

from vllm_sparse_backend.config import SparseConfig
from vllm_sparse_backend.errors import ProfileError, SelectorError
from vllm_sparse_backend.ops import sparse_attention
from vllm_sparse_backend.profile import ModelFacts, Profile, load_profile
from vllm_sparse_backend.selection import ListSelector, parse_policy, registry
from vllm_sparse_backend.selection.s2 import Strided

FACTS = ModelFacts(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution with entry points, and maybe a module, for this test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()

    def shipped(name: str, entries: dict[str, str], **modules: str) -> None:
        install(tmp_path, name, entries)
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
        forget()

    yield shipped
    forget()


MINE = """
from typing import ClassVar, Literal
from vllm_sparse_backend.selection import ListSelector

class Mine(ListSelector):
    selector: Literal["mine"] = "mine"
    spans: tuple[int, ...] = (1, 2)
    tau: float = 0.5

    def keep(self, view):
        return view.causal.expand(len(view.heads), -1, -1)
"""


def test_a_selector_of_somebody_else(ship: Callable[..., None], tmp_path: Path) -> None:
    ship("their-selectors", {"mine": "mine_a:Mine"}, mine_a=MINE)
    policy = parse_policy({"selector": "mine", "spans": [3, 4], "tile": 32})
    assert isinstance(policy, ListSelector)
    assert policy.model_dump()["spans"] == (3, 4)
    assert policy == parse_policy({"selector": "mine", "spans": (3, 4), "tile": 32})
    assert hash(policy) == hash(parse_policy(json.loads(policy.model_dump_json())))
    profile = Profile.build(FACTS, {1: {2: policy}}, defaults=Strided(stride=2), name="p")
    profile.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    assert load_profile(tmp_path / "p.json").digest == profile.digest
    assert profile.kinds() == {policy, Strided(stride=2)}
    assert SparseConfig(policy=policy).policy == policy
    q, k, v = make_qkv(0, 100, 200)
    _, stats = sparse_attention(q, k, v, {"selector": "mine"}, impl="reference")
    assert stats.density == [1.0] * 4
    text = (tmp_path / "p.json").read_text()
    for wrong, said in (
        ('"tau": 0.5', "policies.1.2.mine.tau: input should be a valid number, got 'x'"),
        ('"tile": 32', "policies.1.2.mine.tile: input should be 16, 32 or 64, got 'x'"),
    ):
        (tmp_path / "q.json").write_text(text.replace(wrong, wrong.split(":")[0] + ': "x"'))
        with pytest.raises(ProfileError, match=re.escape(said)):
            load_profile(tmp_path / "q.json")


@pytest.mark.parametrize("value", [{"selector": "magic"}, {"selector": "mine"}])
def test_an_unknown_name_lists_the_known(ship: Callable[..., None], value: dict[str, Any]) -> None:
    ship("their-selectors", {"zebra": "no_such_module:X"})
    with pytest.raises(ValidationError, match=r"'dense', 'static', 'sale', 'mass', .*'zebra'"):
        parse_policy(value)


@pytest.mark.parametrize(
    ("entry", "text", "said"),
    [
        ("nowhere:X", "", r"cannot be imported \(ModuleNotFoundError: .*nowhere"),
        ("mine_b:Other", MINE, r"cannot be imported \(AttributeError: .*Other"),
        ("mine_c:Mine", "1 / 0", r"cannot be imported \(ZeroDivisionError"),
        ("mine_d:tau", "tau = 3", "want a class derived from ListSelector, got 3"),
        ("mine_e:Sale", "from vllm_sparse_backend.selection import Sale", "want a class derived"),
        ("mine_f:Mine", MINE.replace("def keep", "def kept"), "the class has no keep"),
        (
            "mine_k:Mine",
            MINE.replace("tau:", "main_parameter: ClassVar[str] = 'x'\n    tau:"),
            "main_parameter: ",
        ),
        ("mine_g:Mine", MINE.replace('"mine"', '"other"'), "want .* its default is 'other'"),
    ],
)
def test_what_cannot_be_used_is_named(
    ship: Callable[..., None], tmp_path: Path, entry: str, text: str, said: str
) -> None:
    ship("their-selectors", {"mine": entry}, **{entry.split(":")[0]: text} if text else {})
    wanted = rf"selector 'mine = {entry}' \(of their-selectors 0.1.0\): {said}"
    for _ in range(2):  # an error is not forgotten
        with pytest.raises(SelectorError, match=wanted):
            parse_policy({"selector": "mine"})
    (tmp_path / "p.json").write_text(
        Profile.build(FACTS, {}).model_dump_json().replace('"selector":"sale"', '"selector":"mine"')
    )
    with pytest.raises(ProfileError, match=rf"p\.json: {wanted}"):
        load_profile(tmp_path / "p.json")
    assert parse_policy({"selector": "strided"}) == Strided()


def test_two_of_one_name(ship: Callable[..., None]) -> None:
    ship("first", {"mine": "mine_h:Mine"}, mine_h=MINE)
    registry.known()
    ship("second", {"mine": "mine_i:Mine"})
    with pytest.raises(SelectorError, match=r"mine_i:Mine' \(of second.*taken by .*mine_h.*first"):
        registry.known()


@pytest.mark.parametrize("name", ["sale", "dense", "strided"])
def test_this_packages_own_names_are_taken(ship: Callable[..., None], name: str) -> None:
    ship("first", {name: "mine_j:Mine"})
    with pytest.raises(SelectorError, match=rf"selector '{name} = mine_j:Mine' \(of first 0.1.0\)"):
        registry.known()


def test_all_of_the_packages_own_can_be_had() -> None:
    for name in registry.BUILT_IN:
        found = registry.find(name)
        assert found is not None
        assert type(parse_policy({"selector": name})) is found
        assert not found.main_parameter or found.main_parameter in found.model_fields
