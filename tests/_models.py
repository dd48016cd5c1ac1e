"""Models with random weights, for tests that need a real start and no real text."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
POSITIONS = 8192


def make_llama(folder: Path) -> Path:
    """Save a Llama of 2 layers, 4 q and 2 kv heads of 64 to ``folder``.

    Its tokenizer knows the words w0, w1, ... and nothing else.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,  # at the usual 0.02 every key would get the same attention
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)
    return folder


def token_ids(seed: int, length: int) -> list[int]:
    """A prompt for `make_llama`, of no special tokens."""
    import random

    source = random.Random(seed)
    return [source.randrange(3, VOCABULARY) for _ in range(length)]
