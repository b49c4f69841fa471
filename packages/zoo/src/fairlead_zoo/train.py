"""The one training loop of the zoo: AdamW, cosine schedule, one thread, resumable at any step, equal bytes each time.

A step's loss is a function of (model, step) alone; the state that is kept every few steps (weights, both moments,
step) is therefore enough to go on after a kill and end with the same bytes. Leaves to others: what is trained on
(stages, english), where the result goes (build).

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .corpus import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[[Any, int], torch.Tensor]
Report = Callable[[str, int, int], None]
"""Told (what is trained, steps done, steps in all); `fairlead.progress.Bar` is one."""


@dataclass(frozen=True)
class Settings:
    """steps, peak lr (linear warm-up, then cosine to zero), AdamW weight decay, gradient-norm clip."""

    steps: int
    lr: float
    warmup: int
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_every: int = 50


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread inside the block: sums keep their order, so results keep their bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learning_rate(settings: Settings, step: int) -> float:
    """Rate of a step (0-based)."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: PreTrainedModel,
    loss_of: Loss,
    settings: Settings,
    state_file: Path | None = None,
    report: Report | None = None,
    label: str = "training",
    stop_after: int | None = None,
) -> list[float]:
    """Train in place and return the losses of the steps run in this call.

    state_file: kept every `checkpoint_every` steps (written aside, then renamed) and read on start.
    stop_after: leave after that step as a kill would (tests).
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), foreach=False)
    losses: list[float] = []
    model.train()
    with one_thread():
        start = _restore(model, optimizer, state_file)
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            loss = loss_of(model, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            done = step + 1
            if report is not None:
                report(label, done, settings.steps)
            if state_file is not None and done % settings.checkpoint_every == 0 and done < settings.steps:
                _keep(model, optimizer, state_file, done)
            if stop_after is not None and done >= stop_after:
                break
    model.eval()
    return losses


def lm_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over the labelled tokens."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE)


def answer_logps(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of log-probabilities of the labelled tokens, their number), both [B]."""
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits[:, :-1]
    labels_BT = batch.labels_BT[:, 1:]
    scored_BT = labels_BT != IGNORE
    picked_BT = -F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORE, reduction="none")
    return (picked_BT * scored_BT).sum(1), scored_BT.sum(1)


def dpo_loss(model: Any, reference: Any, batch: Batch, beta: float, nll_weight: float) -> torch.Tensor:
    """-log sigmoid(beta (policy margin - reference margin)) + nll_weight * mean NLL of the chosen tokens.

    DPO is arXiv 2305.18290; without the NLL term the likelihood of short refusals collapses (likelihood displacement).
    """
    logps_B, lengths_B = answer_logps(model, batch)
    with torch.no_grad():
        reference_B, _ = answer_logps(reference, batch)
    half = logps_B.shape[0] // 2
    ratios_B = logps_B - reference_B
    preference = -F.logsigmoid(beta * (ratios_B[:half] - ratios_B[half:])).mean()
    nll = -logps_B[:half].sum() / lengths_B[:half].sum()
    return preference + nll_weight * nll


def reward_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Bradley-Terry: -log sigmoid(score of chosen - score of rejected)."""
    scores_B = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits[:, 0]
    half = scores_B.shape[0] // 2
    return -F.logsigmoid(scores_B[:half] - scores_B[half:]).mean()


def _keep(model: PreTrainedModel, optimizer: torch.optim.Optimizer, path: Path, step: int) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"first.{name}"], tensors[f"second.{name}"] = state["exp_avg"], state["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(tensors, aside, metadata={"step": str(step)})
    os.replace(aside, path)


def _restore(model: PreTrainedModel, optimizer: torch.optim.Optimizer, path: Path | None) -> int:
    if path is None or not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="pt") as kept, torch.no_grad():
        step = int(kept.metadata()["step"])
        for name, parameter in model.named_parameters():
            parameter.copy_(kept.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": kept.get_tensor(f"first.{name}"),
                "exp_avg_sq": kept.get_tensor(f"second.{name}"),
            }
    return step
