"""Models within a reward's settings: by name, loaded on first use, or a loaded (model, tokenizer) pair."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from ..errors import DataUnavailableError
from ..logprobs import backbone
from ..models import load, load_tokenizer, resolve

Template = Literal["auto", "chat", "concatenate"]


def check_model(value: Any) -> Any:
    """The setting as it is; ValueError unless it is a name or a (model, tokenizer) pair."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and hasattr(value[0], "config") and callable(value[1])
    if pair or isinstance(value, os.PathLike) or (isinstance(value, str) and value):
        return value
    raise ValueError("must be a folder, a hub id, zoo:NAME or a loaded (model, tokenizer) pair")


def causal(value: Any) -> tuple[Any, Any]:
    """(causal LM, tokenizer) of a setting; DataUnavailableError when it is not to be had."""
    return load(value) if isinstance(value, (str, os.PathLike)) else (value[0], value[1])


def encoder(value: Any) -> tuple[Any, Any]:
    """(AutoModel in float32 and eval mode, tokenizer) of a setting, on the GPU where there is one; of a loaded pair, the
    model without its head."""
    if not isinstance(value, (str, os.PathLike)):
        return backbone(value[0]), value[1]
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(value)
    try:
        model = AutoModel.from_pretrained(resolve(value), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataUnavailableError(f"{os.fspath(value)}: no encoder to be had: {cause}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def name_of(value: Any) -> str:
    """What to call the model of a setting."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    return str(getattr(value[0].config, "_name_or_path", "") or type(value[0]).__name__)


def room(model: Any, longest: int) -> int:
    """Tokens that a sequence may have: `longest`, or fewer where the model has fewer positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(longest, positions) if isinstance(positions, int) and positions > 0 else longest


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Ids of a conversation up to where the model's answer begins, through the chat template."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def plain_ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Ids of a text without a template."""
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids
