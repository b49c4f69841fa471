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
