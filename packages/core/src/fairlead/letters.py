"""Letters of real text that every Python carries, and models over them: for recipes that need no download.

The text is the docstrings of the standard library, lower-cased: 29 symbols, the same for one Python version.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

LETTERS = " abcdefghijklmnopqrstuvwxyz.,"
LEAST = 100_000


@functools.cache
def corpus(most: int = 400_000) -> torch.Tensor:
    """The text as places in `LETTERS`, int64 [T]; InputError where the library's sources are not installed."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if sum(map(len, texts)) > 1.2 * most:
            break
        owners = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        texts += [text for node in owners if (text := ast.get_docstring(node))]
    whole = re.sub(r"[^a-z.,]+", " ", " ".join(texts).lower())[:most]
    if len(whole) < LEAST:
        raise InputError(f"text: the standard library here has {len(whole)} letters of docstrings, {LEAST} are needed; is its source installed?")
    place = {letter: i for i, letter in enumerate(LETTERS)}
    return torch.tensor([place[letter] for letter in whole])


def written(ids: torch.Tensor) -> str:
    """The text of ids [T]."""
    return "".join(LETTERS[i] for i in ids.tolist())


def letter_model(layers: int, width: int, heads: int, seed: int) -> Any:
    """An untrained Llama over the letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
