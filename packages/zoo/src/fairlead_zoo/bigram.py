"""The closed-form bigram language model: each token's successor distribution is one Dirichlet row, nothing is trained.

It is written as an ordinary Llama checkpoint, so every tool loads it by path without custom code: token i is embedded
as a multiple of the i-th unit vector, one layer with zero output weights passes it on (and keeps a normal cache), RMS
normalisation turns it into sqrt(V) times the unit vector, and the head's column i holds the log-probabilities of
row i over sqrt(V). The logits equal the table's log-probabilities to float32 rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import published, write_text

VOCABULARY = 256
CONCENTRATION = 0.08
FLOOR = 1e-20
"""Probabilities below it are raised to it: a Dirichlet(0.08) draw underflows, and log 0 is no weight."""
_SCALE = 1024.0


def transition_table(seed: int = 0, vocab_size: int = VOCABULARY, concentration: float = CONCENTRATION) -> torch.Tensor:
    """Log-probabilities float64 [V, V]: row = current token, column = next token; each row Dirichlet(concentration)."""
    rng = np.random.default_rng([0xB16A, seed])
    table_VV = np.maximum(rng.dirichlet(np.full(vocab_size, concentration), size=vocab_size), FLOOR)
    return torch.from_numpy(np.log(table_VV / table_VV.sum(1, keepdims=True)))


def build_bigram(
    target: Path, seed: int = 0, vocab_size: int = VOCABULARY, concentration: float = CONCENTRATION
) -> dict[str, Any]:
    """Write the checkpoint folder `target`; returns figures (mean row entropy in nats)."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    logp_VV = transition_table(seed, vocab_size, concentration)
    width, inner = vocab_size, 2
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=inner, max_position_embeddings=1 << 20, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ).to_dict()  # fmt: skip
    config.update(architectures=["LlamaForCausalLM"], dtype="float32")
    config.pop("transformers_version", None)
    block = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": torch.eye(width) * _SCALE,
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": (logp_VV.T / width**0.5).float().contiguous(),
        f"{block}.input_layernorm.weight": torch.ones(width),
        f"{block}.post_attention_layernorm.weight": torch.ones(width),
        f"{block}.self_attn.q_proj.weight": torch.zeros(inner, width),
        f"{block}.self_attn.k_proj.weight": torch.zeros(inner, width),
        f"{block}.self_attn.v_proj.weight": torch.zeros(inner, width),
        f"{block}.self_attn.o_proj.weight": torch.zeros(width, inner),
        f"{block}.mlp.gate_proj.weight": torch.zeros(inner, width),
        f"{block}.mlp.up_proj.weight": torch.zeros(inner, width),
        f"{block}.mlp.down_proj.weight": torch.zeros(width, inner),
    }
    with published(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        _tokenizer(vocab_size).save_pretrained(folder)
    entropy = -(logp_VV.exp() * logp_VV).sum(1).mean().item()
    return {"mean_entropy_nats": round(entropy, 4)}


def _tokenizer(vocab_size: int) -> Any:
    """Words t0, t1, ...; t0 doubles as padding, there is no end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocab={f"t{k}": k for k in range(vocab_size)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="t0", padding_side="left", clean_up_tokenization_spaces=False
    )
