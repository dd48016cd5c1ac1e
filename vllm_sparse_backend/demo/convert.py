"""From a GGUF file to a folder that vLLM serves: bf16 weights, config and tokenizer.

transformers reads a GGUF but loses or makes up some of what the model needs; each conversion here
puts that right for the one model it is for.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any


def convert_smollm2(gguf: Path, target: Path) -> None:
    """Write `gguf` (Llama architecture, "smollm" tokenizer) to the folder `target`."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    _convert_weights(gguf, target, LlamaForCausalLM, _llama_config)
    read: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(read.backend_tokenizer)
    _save_tokenizer(read, target)


def convert_gemma3(gguf: Path, target: Path) -> None:
    """Write `gguf` (Gemma 3, text only) to the folder `target`."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM

    _convert_weights(gguf, target, Gemma3ForCausalLM, _gemma3_config)
    read: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _put_bos_in_front(read.backend_tokenizer, read.bos_token, read.bos_token_id)
    _save_tokenizer(read, target)


def _convert_weights(gguf: Path, target: Path, kind: Any, clean_config: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    # Unpacked in fp32, so that the only rounding is the one to bf16 below.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # A model that was loaded from a GGUF carries its quantization along when it is saved; the
    # weights are copied into one that never heard of it.
    config = clean_config(loaded.config)
    clean: Any = kind(config)
    clean.load_state_dict(loaded.state_dict())
    clean = clean.to(torch.bfloat16)
    clean.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    clean.save_pretrained(target)
    del loaded, clean
    gc.collect()


def _llama_config(read: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **_kept(read, "head_dim rope_parameters"), architectures=["LlamaForCausalLM"]
    )


def _gemma3_config(read: Any) -> Any:
    from transformers import Gemma3TextConfig

    # The file says neither which layers slide nor the local base frequency nor the scale of
    # queries: they are the same in every Gemma 3 of this size, and programs know them.
    return Gemma3TextConfig(
        **_kept(read, "head_dim sliding_window"),
        architectures=["Gemma3ForCausalLM"],
        layer_types=[
            "sliding_attention" if (layer + 1) % 6 else "full_attention"
            for layer in range(read.num_hidden_layers)
        ],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        query_pre_attn_scalar=256,
    )


def _kept(read: Any, more: str) -> dict[str, Any]:
    """The fields that are right as transformers reads them."""
    names = f"""
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads max_position_embeddings tie_word_embeddings
        bos_token_id eos_token_id pad_token_id {more}
    """
    return {
        **{name: getattr(read, name) for name in names.split()},
        "dtype": "bfloat16",
        # GGUF keeps it as a float32: 9.999999747378752e-06
        "rms_norm_eps": float(f"{read.rms_norm_eps:.6g}"),
    }


def _split_digits(tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    # The file only says "smollm"; transformers makes GPT-2's pre-tokenizer of it, without the
    # split into single digits that the model was trained with.
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _put_bos_in_front(tokenizer: Any, bos: str, bos_id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    # The file asks for it, and without it Gemma predicts badly throughout; transformers forgets.
    # (Digits are split by the vocabulary: no token has two.)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _save_tokenizer(read: Any, target: Path) -> None:
    from transformers import AutoConfig, PreTrainedTokenizerFast

    # Not of the model's own class, which would build its parts anew when it is loaded.
    PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=AutoConfig.from_pretrained(target).max_position_embeddings,
    ).save_pretrained(target)
