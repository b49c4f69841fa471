"""List-wise likelihoods of a ranking: PRO (arXiv 2306.17492), Plackett-Luce, and its form with a reference (dpo-list).

L = sum_{k<n} [logsumexp_{i>=k}(x_i / T_k^i) - x_k / T_k^k], best first. The order of a group comes from reward, rank or role.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import BetaConfig, NoConfig, group_weight, grouped, preference


def listed(batch: SequenceStats) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of two or more, best first: indices [G, N], places taken [G, N], preference [S]; shorter groups drop out."""
    assert batch.group is not None
    wanted = preference(batch)
    index, taken = grouped(batch.group, by=wanted)
    usable = taken.sum(1) >= 2
    return index[usable], taken[usable], wanted


def ranking_nll(x_GN: torch.Tensor, taken_GN: torch.Tensor, reward_GN: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood [G] of lists of scores, best first.

    x: float [G, N]. taken: bool [G, N], the places that hold a sequence. reward: float [G, N]; with it the temperatures of
    PRO: 1/T_k^i = r_k - r_i for i > k and 1/T_k^k = max_{i>k}(r_k - r_i); all are 1 without it.
    """
    total = torch.zeros_like(x_GN[:, 0])
    for k in range(x_GN.shape[1] - 1):
        active = taken_GN[:, k + 1]  # a term needs somebody after place k
        tail = x_GN[:, k:]
        if reward_GN is not None:
            gap = torch.where(taken_GN[:, k:], reward_GN[:, k : k + 1] - reward_GN[:, k:], 0.0)
            tail = tail * torch.cat([gap.max(1, keepdim=True).values, gap[:, 1:]], 1)
        live = tail.masked_fill(~taken_GN[:, k:], -torch.inf)
        live = torch.where(active[:, None], live, 0.0)  # rows that are over: any finite numbers, no NaN in the gradient
        total = total + torch.where(active, live.logsumexp(1) - live[:, 0], 0.0)
    return total


def refuse_ties(batch: SequenceStats, wanted: torch.Tensor, index: torch.Tensor, taken: torch.Tensor) -> None:
    """InputError where two sequences of a list are ranked equal."""
    assert batch.group is not None
    equal = (wanted[index][:, 1:] == wanted[index][:, :-1]) & taken[:, 1:]
    if bool(equal.any()):
        name = int(batch.group[index[int(equal.nonzero()[0, 0]), 0]])
        raise InputError(f"group {name}: two sequences are ranked equal, which this ranking has no place for (rrhf and aft do)")


class PROConfig(NoConfig):
    """Settings of PRO."""

    sft_weight: float = Field(
        0.0, ge=0, description="w of the likelihood of the best, w (n-1)^2 (-s_best) on the sum, as the published code (0.05)"
    )


class PRO(Objective):
    """PRO: with rewards their differences are the temperatures, with ranks alone every temperature is 1."""

    needs = ("group",)
    Config = PROConfig
    config: PROConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        index, taken, wanted = listed(batch)
        if batch.reward is None:
            refuse_ties(batch, wanted, index, taken)
        if not len(index):
            return batch.logp.new_zeros(0), {"lists": 0.0}
        a_GN = (batch.logp / batch.length)[index]
        losses = ranking_nll(a_GN, taken, None if batch.reward is None else wanted[index])
        losses = losses - self.config.sft_weight * (taken.sum(1) - 1) ** 2 * batch.logp[index[:, 0]]
        return losses * group_weight(batch, index, taken), list_metrics(a_GN, taken)


class PlackettLuce(Objective):
    """The Plackett-Luce likelihood of a strict ranking by a; two sequences: SimPO at beta 1, gamma 0."""

    needs: tuple[str, ...] = ("group",)
    Config: ClassVar[type[MethodConfig]] = NoConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        index, taken, wanted = listed(batch)
        refuse_ties(batch, wanted, index, taken)
        if not len(index):
            return batch.logp.new_zeros(0), {"lists": 0.0}
        x_GN = self.score(batch)[index]
        return ranking_nll(x_GN, taken) * group_weight(batch, index, taken), list_metrics(x_GN, taken)

    def score(self, batch: SequenceStats) -> torch.Tensor:
        """What is ranked, [S]."""
        return batch.logp / batch.length


class DPOList(PlackettLuce):
    """The Plackett-Luce form of DPO (2305.18290, appendix A.3): the ranking by beta u; two sequences: DPO."""

    needs = ("group", "ref_logp")
    Config = BetaConfig
    config: BetaConfig

    def score(self, batch: SequenceStats) -> torch.Tensor:
        assert batch.ref_logp is not None
        return self.config.beta * (batch.logp - batch.ref_logp.detach())


def list_metrics(x_GN: torch.Tensor, taken_GN: torch.Tensor) -> dict[str, float]:
    """Lists in the batch, and the share of neighbours in rank whose scores are in that order."""
    both = taken_GN[:, 1:]
    right = (x_GN.detach()[:, :-1] > x_GN.detach()[:, 1:]) & both
    return {"lists": float(len(x_GN)), "rewards/accuracies": float(right.sum() / both.sum().clamp(min=1))}
