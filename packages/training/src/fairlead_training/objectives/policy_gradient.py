"""On-policy objectives: REINFORCE and RLOO (arXiv 2402.14740), GRPO (2402.03300) and its aggregations, GSPO (2507.18071).

Rewards become advantages within a group; the loss is -A s, or a clipped ratio to the policy that drew the samples. Where
advantages come from and how samples are drawn is left to the trainer.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import NoConfig, soft_exp, weights
from .unpaired import over_ranks


def group_sums(values: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of a group's values and its size, at each of its sequences: [S], [S]."""
    _, row, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=values.dtype, device=values.device).index_add_(0, row, values)
    return sums[row], sizes[row].to(values.dtype)


def leave_one_out(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """RLOO's advantages [S]: the reward less the mean of the group's others; 0 in a group of one."""
    total, size = group_sums(reward, group)
    return torch.where(size > 1, reward - (total - reward) / (size - 1).clamp(min=1), 0.0)


def normalised(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """GRPO's advantages [S]: (R - mean) / (std + 1e-4), standard deviation with n - 1; 0 in a group of one."""
    total, size = group_sums(reward, group)
    away = reward - total / size
    squares, _ = group_sums(away.square(), group)
    return torch.where(size > 1, away / ((squares / (size - 1).clamp(min=1)).sqrt() + 1e-4), 0.0)


def _metrics(batch: SequenceStats, advantage: torch.Tensor) -> dict[str, float]:
    assert batch.reward is not None
    return {"reward": float(batch.reward.to(advantage.dtype).mean()), "advantage/abs": float(advantage.abs().mean())}


class Reinforce(Objective):
    """L = -A s, the reward column taken as the advantage A."""

    needs: tuple[str, ...] = ("reward",)
    past: str = ""  # the column of `extra` that holds the log-probabilities under the policy that drew
    Config = NoConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        advantage = self.advantage(batch) * weights(batch)
        return -advantage * batch.logp, _metrics(batch, advantage)

    def advantage(self, batch: SequenceStats) -> torch.Tensor:
        """What each sequence is pushed by, [S], without gradient."""
        assert batch.reward is not None
        return batch.reward.detach().to(batch.logp.dtype)


class RLOO(Reinforce):
    """L = -A s, A the reward less the mean reward of the group's others."""

    needs = ("reward", "group")

    def advantage(self, batch: SequenceStats) -> torch.Tensor:
        assert batch.reward is not None and batch.group is not None
        return leave_one_out(batch.reward.detach().to(batch.logp.dtype), batch.group)


class GRPOConfig(MethodConfig):
    """Settings of GRPO."""

    epsilon: float = Field(0.2, gt=0, description="how far the ratio may go from 1 before its gradient is cut")
    beta_kl: float = Field(0.0, ge=0, description="weight of the estimated KL to the reference, e^d - d - 1 with d = ref - logp")
    aggregation: Literal["grpo", "bnpo", "dapo", "dr-grpo"] = Field(
        "grpo",
        description="mean of sequence means; mean over the batch's tokens; over the tokens of all processes; sum / (S max_length)",
    )
    max_length: int | None = Field(None, ge=1, description="longest completion, for dr-grpo")


class GRPO(Objective):
    """Token loss -min(rho A, clip(rho, 1-epsilon, 1+epsilon) A) + beta_kl (e^d - d - 1), one item per sequence.

    Columns of `extra`: `token_logp` [S, T] (carries the gradient, comes back as `dtokens`), `token_mask` bool [S, T],
    `old_token_logp` [S, T] (the policy that drew; by default the present one), `ref_token_logp` [S, T] for beta_kl.
    Without token_logp the samples are taken as the present policy's own, rho = 1: then `dlogp` holds the gradient.
    """

    needs: tuple[str, ...] = ("reward", "group")
    past = "old_token_logp"
    Config = GRPOConfig
    config: GRPOConfig

    def setup(self) -> None:
        if self.config.aggregation == "dr-grpo" and self.config.max_length is None:
            raise InputError("GRPO: max_length: dr-grpo divides by it, give the longest completion allowed")
        if self.config.beta_kl:
            self.needs = (*type(self).needs, "token_logp", "ref_token_logp")

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.reward is not None and batch.group is not None
        advantage = normalised(batch.reward.detach().to(batch.logp.dtype), batch.group)
        shown = _metrics(batch, advantage)
        if "token_logp" in batch.extra:
            total, length, more = self._over_tokens(batch, advantage)
            shown |= more
        else:
            if "old_logp" in batch.extra or "old_token_logp" in batch.extra:
                raise InputError("token_logp: samples of an older policy need the log-probabilities of their tokens (or gspo)")
            length = batch.length.to(batch.logp.dtype)
            total = -advantage * (length + batch.logp - batch.logp.detach())
        return total / self._divisor(length) * weights(batch), shown

    def _over_tokens(
        self, batch: SequenceStats, advantage: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Loss of each sequence's tokens, summed [S], their number [S] and metrics."""
        batch.require("token_mask")
        logp_ST, mask_ST = batch.extra["token_logp"], batch.extra["token_mask"].to(torch.bool)
        old_ST = batch.extra.get("old_token_logp", logp_ST).detach()
        change = torch.where(mask_ST, logp_ST - old_ST, 0.0)
        loss_ST, cut_ST = clipped(change, advantage[:, None], self.config.epsilon)
        count = mask_ST.sum().clamp(min=1)
        shown = {"clip_ratio": float((cut_ST & mask_ST).sum() / count)}
        if self.config.beta_kl:
            d_ST = torch.where(mask_ST, batch.extra["ref_token_logp"].detach() - logp_ST, 0.0)
            kl_ST = soft_exp(d_ST) - d_ST - 1
            loss_ST = loss_ST + self.config.beta_kl * kl_ST
            shown["kl"] = float(kl_ST.detach().sum() / count)
        return torch.where(mask_ST, loss_ST, 0.0).sum(1), mask_ST.sum(1).to(logp_ST.dtype), shown

    def _divisor(self, length: torch.Tensor) -> torch.Tensor:
        """What a sequence's sum is divided by, so that the mean over sequences is the aggregation."""
        kind = self.config.aggregation
        if kind == "grpo":
            return length.clamp(min=1)
        if kind == "dr-grpo":
            return torch.full_like(length, float(self.config.max_length or 1))
        both = torch.stack([length.sum(), torch.full_like(length[0], len(length))])
        total, sequences = over_ranks(both) if kind == "dapo" else both
        return (total / sequences).clamp(min=1e-9).expand_as(length)


class GSPOConfig(MethodConfig):
    """Settings of GSPO."""

    epsilon: float = Field(3e-4, gt=0, description="how far the ratio, a mean over tokens, may go from 1")


class GSPO(Objective):
    """L = -min(rho A, clip(rho) A), rho = exp((s - s_old) / n) of the sequence; `old_logp` of `extra`, by default s."""

    needs = ("reward", "group")
    past = "old_logp"
    Config = GSPOConfig
    config: GSPOConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.reward is not None and batch.group is not None
        advantage = normalised(batch.reward.detach().to(batch.logp.dtype), batch.group)
        old = batch.extra.get("old_logp", batch.logp).detach()
        losses, cut = clipped((batch.logp - old) / batch.length, advantage, self.config.epsilon)
        return losses * weights(batch), {**_metrics(batch, advantage), "clip_ratio": float(cut.to(losses.dtype).mean())}


def clipped(change: torch.Tensor, advantage: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(rho A, clip(rho, 1-epsilon, 1+epsilon) A) for rho = e^change, and where the clipped term is the smaller."""
    ratio = soft_exp(change)
    plain, bounded = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
    return -torch.minimum(plain, bounded), (bounded < plain).detach()
