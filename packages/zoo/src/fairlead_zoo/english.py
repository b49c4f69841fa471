"""A small language model of real English that needs no download: trained on Python's own documentation.

The text is what every Python carries: `pydoc_data.topics`, the docstrings of the standard library's sources (read with
`ast`, nothing is imported) and those of the built-in types. Another Python version has slightly other text, so the
checkpoint that ships names the version it was trained on. Leaves to others: the training loop (train).

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import os
import sysconfig
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .corpus import generator
from .train import Report, Settings, lm_loss, one_thread, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
HELD_OUT_SHARE = 0.05
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})


@dataclass(frozen=True)
class EnglishSettings:
    """Vocabulary, shape and training length; about ten minutes of one thread."""

    vocab_size: int = 4096
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    context: int = 256
    batch: int = 8
    steps: int = 1400
    lr: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.1


def documents() -> list[str]:
    """Every distinct documentation string, at least 40 characters long, in a fixed order (sorted)."""
    texts: set[str] = set()
    from pydoc_data import topics

    texts.update(text.strip() for text in topics.topics.values())
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)
        for name in files:
            if name.endswith(".py"):
                texts.update(_docstrings(Path(folder) / name))
    import builtins
    import collections
    import datetime
    import itertools

    for module in (builtins, collections, datetime, itertools, types):
        for value in vars(module).values():
            owners = [value, *vars(value).values()] if isinstance(value, type) else [value]
            docs = (getattr(owner, "__doc__", None) for owner in owners)
            texts.update(inspect.cleandoc(doc) for doc in docs if isinstance(doc, str))
    return sorted(text for text in texts if len(text) >= 40)


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) documents; a hash of the text decides, so the split is the same everywhere."""
    held_out = [text for text in texts if _share(text) < HELD_OUT_SHARE]
    return [text for text in texts if _share(text) >= HELD_OUT_SHARE], held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; left padding, <|endoftext|> between documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """All documents as one id stream, each followed by the end token."""
    end = tokenizer.eos_token_id
    stream: list[int] = [end]
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, end]
    return torch.tensor(stream)


def perplexity(model: Any, stream: torch.Tensor, context: int = 256) -> tuple[float, float]:
    """(perplexity per token, mean entropy in nats) over windows of `context` tokens laid end to end."""
    windows = stream[: len(stream) // context * context].view(-1, context)
    nll, entropy, count = 0.0, 0.0, 0
    with one_thread(), torch.inference_mode():
        for ids_BT in windows.split(16):
            logp_BTV = model(input_ids=ids_BT).logits[:, :-1].float().log_softmax(-1)
            nll -= logp_BTV.gather(-1, ids_BT[:, 1:, None]).sum().item()
            entropy -= (logp_BTV.exp() * logp_BTV).sum().item()
            count += ids_BT[:, 1:].numel()
    return math.exp(nll / count), entropy / count


def build_english(
    target: Path,
    seed: int = 0,
    settings: EnglishSettings | None = None,
    *,
    state_file: Path | None = None,
    report: Report | None = None,
    stop_after: int | None = None,
) -> dict[str, Any] | None:
    """Train tokenizer and model and write the folder `target`; returns figures, None when `stop_after` ended it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from .build import write_folder
    from .real_models import quiet

    s = settings or EnglishSettings()
    started, cpu = time.monotonic(), time.process_time()
    training, held_out = split(documents())
    tokenizer = train_tokenizer(training, s.vocab_size)
    stream, test = encode(tokenizer, training), encode(tokenizer, held_out)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=s.hidden,
        intermediate_size=s.mlp,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def loss_of(model: Any, step: int) -> torch.Tensor:
        rng = generator("english", seed, step)
        starts = [rng.randrange(len(stream) - s.context) for _ in range(s.batch)]
        ids_BT = torch.stack([stream[start : start + s.context] for start in starts])
        return lm_loss(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)

    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        loop = Settings(s.steps, s.lr, s.warmup, s.weight_decay, checkpoint_every=100)
        losses = train(model, loss_of, loop, state_file, report, "english", stop_after)
    if stop_after is not None and stop_after < s.steps:
        return None
    write_folder(model, tokenizer, target)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    with quiet():
        stored = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    per_token, entropy = perplexity(stored, test, s.context)
    characters = sum(map(len, held_out))
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "final_loss": round(sum(losses[-20:]) / max(1, len(losses[-20:])), 4),
        "training_tokens": len(stream),
        "held_out_tokens": len(test),
        "held_out_perplexity": round(per_token, 2),
        "held_out_bits_per_character": round(math.log2(per_token) * len(test) / characters, 3),
        "mean_entropy_nats": round(entropy, 3),
        "python": sysconfig.get_python_version(),
    }


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return []  # deliberately broken sources, as lib2to3 carries for its tests
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text.strip() for text in found if text]


def _share(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
