"""PoFT: fine-tuning that asks to beat the likelihood of aligned models on each sample (arXiv 2412.12865).

L = -ls(beta (a - r_bar) + gamma), r_bar the mean over aligned models of their mean log-probability of a token, each with
its own tokenizer. dL/da = -beta tau, tau = sg(-(beta (a - r_bar) + gamma)): cross-entropy with a weight per sample. gamma
is added; SimPO and LOGO subtract theirs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import BetaConfig, weights


class PoFTConfig(BetaConfig):
    """Settings of PoFT."""

    beta: float = Field(1.0, gt=0, description="weight of the difference of means")
    gamma: float = Field(0.0, description="added to it: log k asks for 1/k of the aligned models' likelihood")


class PoFT(Objective):
    """One item per sequence; the column `ref_logp_mean` of `extra` holds r_bar, at most 0."""

    needs = ("ref_logp_mean",)
    Config = PoFTConfig
    config: PoFTConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        r_bar = batch.extra["ref_logp_mean"].detach().to(batch.logp.dtype)
        if not bool((r_bar.isfinite() & (r_bar <= 0)).all()):
            wrong = r_bar[~(r_bar.isfinite() & (r_bar <= 0))][0]
            raise InputError(f"ref_logp_mean: a mean log-probability is finite and at most 0, got {float(wrong):g}; drop such rows")
        a = batch.logp / batch.length
        argument = self.config.beta * (a - r_bar) + self.config.gamma
        tau = torch.sigmoid(-argument.detach())
        shown = {"poft/tau": tau.mean(), "poft/ce": -a.detach().mean(), "poft/ref_logp_mean": r_bar.mean()}
        return -logsigmoid(argument) * weights(batch), {k: float(v) for k, v in shown.items()}
