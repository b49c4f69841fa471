"""A model to try things on in milliseconds; needs no pytest, so that examples can use it."""

from __future__ import annotations

import functools
from typing import Any

import torch

VOCABULARY = 64


@functools.cache
def tiny_model(vocab_size: int = VOCABULARY, seed: int = 0) -> Any:
    """A random two-layer LlamaForCausalLM with a sharp next-token law, for generation in milliseconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_tiny_model(folder: Any, vocab_size: int = VOCABULARY, seed: int = 0) -> None:
    """A tiny model and a tokenizer of the words w0, w1, ... (`<pad>`, `<eos>`, `<unk>` first, one id of the logits unused) in
    `folder`, as a user would have them on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    names = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(vocab_size - 4)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
