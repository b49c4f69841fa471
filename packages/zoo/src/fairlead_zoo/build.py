"""Builds one checkpoint of a family: model, stage, training loop, files. The recipe's hash names the result.

A finished folder appears under its name in one rename, so a reader never sees half of it; training state beside it
lets a killed build go on. Leaves to others: names and where things are found (catalogue).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import lexicon as lx
from .files import published, write_text
from .real_models import quiet
from .stages import Sampler, Stage
from .tokenizer import build_tokenizer
from .train import Report, Settings, dpo_loss, lm_loss, one_thread, reward_loss, train
from .world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Width, depth and so on of the family's LlamaForCausalLM."""

    hidden: int = 128
    layers: int = 5
    heads: int = 4
    mlp: int = 384
    initializer_range: float = 0.06


STANDARD = Architecture()


def llama_config(world: World, architecture: Architecture) -> Any:
    """The LlamaConfig of a family."""
    from transformers import LlamaConfig

    vocabulary = world.vocabulary()
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=architecture.hidden,
        intermediate_size=architecture.mlp,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=512,
        initializer_range=architecture.initializer_range,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.index(lx.PAD),
        bos_token_id=vocabulary.index(lx.BOS),
        eos_token_id=vocabulary.index(lx.END),
    )


def recipe_hash(world: World, stage: Stage, seed: int, architecture: Architecture, parent_hash: str) -> str:
    """Sixteen hexadecimal digits over everything that decides a checkpoint's bytes on one machine."""
    recipe = {
        "world": [world.seed, world.crossed, world.vocabulary()],
        "stage": stage.recipe(),
        "seed": seed,
        "architecture": vars(architecture),
        "parent": parent_hash,
        "torch": torch.__version__.split("+")[0],
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def build_stage(
    world: World,
    stage: Stage,
    seed: int,
    parent: Path | None,
    target: Path,
    *,
    architecture: Architecture = STANDARD,
    state_file: Path | None = None,
    report: Report | None = None,
    stop_after: int | None = None,
    checkpoint_every: int = 20,
) -> dict[str, Any] | None:
    """Train `stage` from the checkpoint folder `parent` (None: from scratch) and write the folder `target`.

    Weights are stored in bfloat16 and load as float32; a child starts from its parent's stored weights, so shipped
    and rebuilt parents are the same thing. Returns figures (seconds, CPU seconds, final loss), or None when
    `stop_after` ended it.
    """
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    started, cpu = time.monotonic(), time.process_time()
    with quiet(), one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        if parent is None:
            model = LlamaForCausalLM(llama_config(world, architecture))
        elif stage.objective == "reward":
            model = LlamaForSequenceClassification.from_pretrained(parent, num_labels=1, dtype=torch.float32)
            torch.nn.init.normal_(model.score.weight, std=0.02)
        else:
            model = LlamaForCausalLM.from_pretrained(parent, dtype=torch.float32)
        reference = None
        if stage.objective == "dpo":
            reference = LlamaForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
        sampler = Sampler(world, stage, seed)

        def loss_of(model: Any, step: int) -> torch.Tensor:
            if stage.objective == "dpo":
                return dpo_loss(model, reference, sampler.pair_batch(step), stage.beta, stage.nll_weight)
            if stage.objective == "reward":
                return reward_loss(model, sampler.pair_batch(step))
            batch = sampler.batch(step)
            output = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
            return lm_loss(output.logits, batch.labels_BT)

        settings = Settings(stage.steps, stage.lr, stage.warmup, stage.weight_decay, checkpoint_every=checkpoint_every)
        losses = train(model, loss_of, settings, state_file, report, stage.name, stop_after)
    if stop_after is not None and stop_after < stage.steps:
        return None
    write_folder(model, build_tokenizer(world), target)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    tail = losses[-20:]
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "final_loss": round(sum(tail) / len(tail), 4) if tail else None,
    }


def write_folder(model: PreTrainedModel, tokenizer: Any, target: Path) -> None:
    """Save a checkpoint (bfloat16 weights that load as float32) and its tokenizer under `target` in one rename."""
    from safetensors.torch import save_file

    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied}
    config = model.config.to_dict()
    config.update(architectures=[type(model).__name__], dtype="float32")
    for key in ("transformers_version", "_name_or_path"):
        config.pop(key, None)
    with published(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(folder)
