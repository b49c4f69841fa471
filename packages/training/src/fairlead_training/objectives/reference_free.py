"""Pairwise objectives without a reference model: SimPO, AlphaPO, ORPO, CPO, SLiC, and plain fine-tuning on the chosen.

a = s / n is the mean log-probability of a token; NLL terms are means over a sequence's tokens, but SFT's over the batch's.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch.nn.functional import logsigmoid

from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import PAIRED, BetaConfig, NoConfig, PairObjective, Side, log1mexp, soft_exp, weights


class SFT(Objective):
    """Fine-tuning on the chosen sequences, or on all where no role is given: L = -sum s / sum n over the batch.

    The mean is over tokens: every entry of `per_item` is that scalar. Weights multiply a sequence's s.
    """

    Config = NoConfig

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        wanted = torch.ones_like(batch.length, dtype=torch.bool) if batch.role is None else batch.role == 1
        if not bool(wanted.any()):
            raise InputError("role: no chosen sequence in the batch")
        s = torch.where(wanted, batch.logp * weights(batch), 0.0).sum()
        loss = -s / torch.where(wanted, batch.length, 0).sum()
        return loss.expand(int(wanted.sum())), {"logps/chosen": float(batch.logp.detach()[wanted].mean())}


class SimPOConfig(BetaConfig):
    """Settings of SimPO; `gamma_beta_ratio` may replace `gamma`."""

    beta: float = Field(2.0, gt=0, description="weight of the difference of means (paper: 2 to 10)")
    gamma: float = Field(1.0, ge=0, description="margin, subtracted outside beta (paper: 0.3 to 0.8 of beta)")
    gamma_beta_ratio: float | None = Field(None, ge=0, description="gamma / beta, in nats a token; alone it sets gamma")

    @model_validator(mode="before")
    @classmethod
    def _gamma_from_ratio(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("gamma_beta_ratio") is not None:
            beta, ratio = data.get("beta", cls.model_fields["beta"].default), data["gamma_beta_ratio"]
            if not all(isinstance(v, (int, float)) for v in (beta, ratio)):
                return data
            gamma = data.get("gamma", ratio * beta)
            if isinstance(gamma, (int, float)) and abs(gamma - ratio * beta) > 1e-9 * max(1.0, abs(gamma)):
                raise ValueError(f"gamma {gamma:g} and gamma_beta_ratio {ratio:g} disagree at beta {beta:g}; give one of them")
            return {**data, "gamma": gamma}
        return data


class SimPO(PairObjective):
    """SimPO (2405.14734): L = -ls(beta (a_w - a_l) - gamma)."""

    needs = PAIRED
    Config = SimPOConfig
    config: SimPOConfig
    quantity = "a"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.a - l.a) - self.config.gamma)


class AlphaPOConfig(SimPOConfig):
    """Settings of AlphaPO."""

    alpha: float = Field(0.25, description="shape of the reward; 0 is SimPO")


class AlphaPO(PairObjective):
    """AlphaPO (2501.03884): SimPO on r = (1 - e^{-alpha a}) / alpha; the exponential is continued linearly from e^30."""

    needs = PAIRED
    Config = AlphaPOConfig
    config: AlphaPOConfig
    quantity = "a"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (self.shaped(w.a) - self.shaped(l.a)) - self.config.gamma)

    def shaped(self, a: torch.Tensor) -> torch.Tensor:
        """The reward of mean log-probabilities."""
        alpha = self.config.alpha
        return a if alpha == 0 else (1 - soft_exp(-alpha * a)) / alpha


class ORPOConfig(BetaConfig):
    """Settings of ORPO."""

    beta: float = Field(1.0, gt=0, description="scale of the rewards in the metrics only")
    lam: float = Field(0.1, ge=0, description="weight of the odds ratio")


class ORPO(PairObjective):
    """ORPO (2403.07691): L = -a_w - lam ls(o), o = lo(a_w) - lo(a_l), lo(a) = a - log(1 - e^a)."""

    needs = PAIRED
    Config = ORPOConfig
    config: ORPOConfig
    quantity = "a"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        odds = (w.a - log1mexp(w.a)) - (l.a - log1mexp(l.a))
        return -w.a - self.config.lam * logsigmoid(odds)


class CPOConfig(BetaConfig):
    """Settings of CPO."""

    lam: float = Field(1.0, ge=0, description="weight of the mean negative log-likelihood of the chosen sequence")


class CPO(PairObjective):
    """CPO (2401.08417): L = -ls(beta (s_w - s_l)) - lam a_w."""

    needs = PAIRED
    Config = CPOConfig
    config: CPOConfig
    quantity = "s"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.s - l.s)) - self.config.lam * w.a


class CPOIPOConfig(BetaConfig):
    """Settings of the IPO form of CPO."""

    lam: float = Field(0.0, ge=0, description="weight of the mean negative log-likelihood of the chosen sequence")


class CPOIPO(PairObjective):
    """CPO's IPO form: L = (a_w - a_l - 1/(2 beta))^2 - lam a_w."""

    needs = PAIRED
    Config = CPOIPOConfig
    config: CPOIPOConfig
    quantity = "a"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return (w.a - l.a - 0.5 / self.config.beta).square() - self.config.lam * w.a


class SLiCConfig(NoConfig):
    """Settings of SLiC."""

    delta: float = Field(1.0, ge=0, description="margin of the hinge, in nats")
    lam: float = Field(0.1, ge=0, description="weight of the log-likelihood (a sum) of the chosen sequence")


class SLiC(PairObjective):
    """SLiC-HF (2305.10425): L = max(0, delta - s_w + s_l) - lam s_w."""

    needs = PAIRED
    Config = SLiCConfig
    config: SLiCConfig
    quantity = "s"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return (self.config.delta - w.s + l.s).clamp(min=0) - self.config.lam * w.s
