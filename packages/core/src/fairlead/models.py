"""Models by name: a folder, a hub id or "zoo:NAME" wherever a model is accepted. Remote code is never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import plugins
from .errors import DataUnavailableError, InputError


def resolve(name: str | os.PathLike[str]) -> str:
    """The local path or hub id behind a name; "SCHEME:NAME" is answered by a plugin (zoo: by fairlead-zoo)."""
    text = os.fspath(name)
    if not text:
        raise InputError("model: the name is empty; give a folder, a hub id or zoo:NAME")
    scheme, colon, _ = text.partition(":")
    if colon and len(scheme) > 1 and not Path(text).exists():
        found = plugins.resolve(text)
        if found is not None:
            return found
        if scheme == "zoo":
            raise DataUnavailableError(f"{text}: fairlead-zoo answers zoo: names; pip install fairlead-zoo")
        raise InputError(f"{text}: no plugin answers the scheme {scheme!r}")
    return text


def _folder(name: str | os.PathLike[str]) -> str:
    path = resolve(name)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise InputError(f"{path}: holds no config.json, so it is no Hugging Face model folder")
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InputError(f"{path}: no such model folder")
    return path


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model, padding on the left, with a padding token."""
    from transformers import AutoTokenizer

    path = _folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        raise _unavailable(name, "tokenizer", error) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load(name: str | os.PathLike[str], device: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """(causal LM in eval mode, its tokenizer). device: default cuda when there is one; dtype: default float32 on the
    CPU, the checkpoint's own elsewhere. DataUnavailableError in one line when it is not to be had."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = _folder(name)
    logging.disable_progress_bar()  # a bar of its own for files that load in a moment
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _unavailable(name, "model", error) from None
    return model.to(device).eval(), load_tokenizer(name)


def causal_lm(value: Any, beside: Any = None, role: str = "model") -> Any:
    """A causal LM in eval mode from a model object or a name (loaded to the device of `beside`).

    role: what it is for, in messages. InputError when its logits have another width than those of `beside`, the model
    that it is to work with."""
    model = value if hasattr(value, "forward") else load(value, device=getattr(beside, "device", None))[0]
    if beside is not None and logits_width(model) != logits_width(beside):
        raise InputError(
            f"{role}: {_named(model)} has logits of width {logits_width(model)}, {_named(beside)} of width "
            f"{logits_width(beside)}; the two must share one tokenizer"
        )
    return model


def _named(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def logits_width(model: Any) -> int:
    """Width of the model's logits, padding rows of the head included: the `vocab_size` of a watermark."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])


def _unavailable(name: str | os.PathLike[str], what: str, error: Exception) -> DataUnavailableError:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataUnavailableError(f"{os.fspath(name)}: no {what} to be had: {cause}")
