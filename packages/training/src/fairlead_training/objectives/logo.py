"""LOGO: preference of one chosen answer over M rejected ones, without a reference model (arXiv 2410.18533).

L = -ls(beta a_w - (beta / M) sum_j a_l^j - gamma) - lam a_w, each mean over its own length; M = 1, lam = 0 is SimPO. The
paper's eq. (3) has the other sign before the likelihood, which would lower it; its code agrees with this one.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import PAIRED, group_weight, grouped
from .reference_free import SimPOConfig


class LOGOConfig(SimPOConfig):
    """Settings of LOGO."""

    beta: float = Field(10.0, gt=0, description="weight of the difference of means (paper: 2.5 to 10)")
    gamma: float = Field(3.0, ge=0, description="margin, subtracted outside beta (paper: 0.1 to 0.3 of beta)")
    lam: float = Field(0.1, ge=0, description="weight of the mean log-likelihood of the chosen answer")


class LOGO(Objective):
    """One item per group of one chosen and M >= 1 rejected sequences; M may differ between groups."""

    needs = PAIRED
    Config = LOGOConfig
    config: LOGOConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.group is not None and batch.role is not None
        index, taken = grouped(batch.group)
        chosen, rejected = (taken & (batch.role[index] == role) for role in (1, -1))
        wrong = (chosen.sum(1) != 1) | (rejected.sum(1) < 1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            name, has = int(batch.group[index[row, 0]]), (int(chosen[row].sum()), int(rejected[row].sum()))
            raise InputError(f"group {name}: has {has[0]} chosen and {has[1]} rejected sequences, needs one and at least one")
        a_GN = (batch.logp / batch.length)[index]
        a_w = torch.where(chosen, a_GN, 0.0).sum(1)
        a_l = torch.where(rejected, a_GN, 0.0).sum(1) / rejected.sum(1)
        losses = -logsigmoid(self.config.beta * (a_w - a_l) - self.config.gamma) - self.config.lam * a_w
        with torch.no_grad():
            shown = {
                "rewards/chosen": float(self.config.beta * a_w.mean()),
                "rewards/rejected": float(self.config.beta * a_l.mean()),
                "rewards/margins": float(self.config.beta * (a_w - a_l).mean()),
                "rewards/accuracies": float((a_w > a_l).to(a_w.dtype).mean()),
            }
        return losses * group_weight(batch, index, chosen | rejected), shown
