"""What a callback may ask of PreferenceTrainer: the trainer itself, rows made ready, other weights in the backward pass."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from fairlead.testing import tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer

PAIRS = [{"prompt_ids": [3 + i, 5], "completion_ids": [[10 + i, 11], [20 + i]], "role": [1, -1]} for i in range(4)]


class Reweighting(TrainerCallback):
    """Multiplies the weights and keeps what it saw."""

    def __init__(self, factor: float) -> None:
        self.factor, self.seen = factor, []

    def attach(self, trainer: PreferenceTrainer) -> None:
        trainer.reweight = self
        self.ready = trainer.prepare(PAIRS[:1], "probe")

    def __call__(self, dlogp: torch.Tensor, stats: Any) -> torch.Tensor:
        self.seen.append((dlogp.shape == stats.logp.shape, stats.logp.requires_grad, stats.role.tolist()[:2]))
        return self.factor * dlogp


def trained(folder: Path, learning_rate: float, *callbacks: Any) -> PreferenceTrainer:
    args = PreferenceConfig(
        output_dir=str(folder), learning_rate=learning_rate, per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", ref_cache_dir=str(folder), lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    run = PreferenceTrainer(copy.deepcopy(tiny_model()), "dpo", args, PAIRS, PAIRS, callbacks=list(callbacks))
    run.train()
    return run


def weights(run: PreferenceTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_half_the_weights_at_twice_the_rate_are_the_same_training(tmp_path: Path) -> None:
    half = Reweighting(0.5)
    plain, halved = trained(tmp_path, 5e-3), trained(tmp_path, 1e-2, half)
    torch.testing.assert_close(weights(plain), weights(halved))
    assert halved.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the loss shown is still the objective's
    halved.evaluate()
    assert half.seen == [(True, True, [1, -1])] * 2  # in training steps alone


def test_rows_of_a_callback_are_made_ready_and_no_weights_are_no_step(tmp_path: Path) -> None:
    silent = Reweighting(0.0)
    run = trained(tmp_path, 1e-2, silent)
    assert torch.equal(weights(run), torch.cat([p.detach().flatten() for p in tiny_model().parameters()]))
    assert silent.ready[0]["ref_logp"] == run.train_dataset[0]["ref_logp"]
