"""Pairwise objectives with a reference model: DPO (arXiv 2305.18290) and its family, one small class each.

D = u_w - u_l, z = beta D; d_w = -dL/ds_w and d_l = dL/ds_l are the weights with which a step pulls the chosen sequence up
and the rejected one down. Reference-free pair losses are in reference_free.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.errors import ConfigError, InputError
from fairlead.kinds import SequenceStats

from .common import BetaConfig, MarginObjective, PairObjective, Side, grouped, soft_exp, weights


class DPO(MarginObjective):
    """L = -ls(z); d_w = d_l = beta sg(-z)."""

    Config = BetaConfig
    config: BetaConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        return -logsigmoid(self.config.beta * margin)


class SmoothedConfig(BetaConfig):
    """Settings of an objective that allows for wrong labels."""

    eps: float = Field(0.1, ge=0, lt=0.5, description="share of pairs whose labels are assumed to be swapped")


class CDPO(MarginObjective):
    """Conservative DPO: L = -(1-eps) ls(z) - eps ls(-z); d_w = d_l = beta (sg(-z) - eps), which reverses at sg(z) = 1 - eps."""

    Config = SmoothedConfig
    config: SmoothedConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        z, eps = self.config.beta * margin, self.config.eps
        return -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)


class RobustDPO(MarginObjective):
    """Robust DPO (2403.00409), unbiased under swapped labels: L = [-(1-eps) ls(z) + eps ls(-z)] / (1 - 2 eps)."""

    Config = SmoothedConfig
    config: SmoothedConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        z, eps = self.config.beta * margin, self.config.eps
        return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


class IPOSum(MarginObjective):
    """IPO as published (2310.12036), on sums: L = (D - 1/(2 beta))^2; beta is the paper's tau."""

    Config = BetaConfig
    config: BetaConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        return (margin - 0.5 / self.config.beta).square()


class IPO(PairObjective):
    """IPO on token means, as TRL has it: L = (ub_w - ub_l - 1/(2 beta))^2."""

    Config = BetaConfig
    config: BetaConfig
    quantity = "ub"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return (w.ub - l.ub - 0.5 / self.config.beta).square()


class Hinge(MarginObjective):
    """Hinge of RSO (2309.06657): L = max(0, 1 - z)."""

    Config = BetaConfig
    config: BetaConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        return (1 - self.config.beta * margin).clamp(min=0)


class ExoPairConfig(BetaConfig):
    """Settings of EXO on pairs."""

    eps: float = Field(1e-3, gt=0, lt=0.5, description="label smoothing; the loss holds its logarithm, so not zero")


class ExoPair(MarginObjective):
    """EXO on pairs (2402.00856), reverse KL to the smoothed label, q = sg(z):
    L = q (ls(z) - log(1-eps)) + (1-q) (ls(-z) - log eps)."""

    Config = ExoPairConfig
    config: ExoPairConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        z, eps = self.config.beta * margin, self.config.eps
        right = torch.sigmoid(z) * (logsigmoid(z) - math.log(1 - eps))
        return right + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(eps))


class NCAPair(PairObjective):
    """NCA on pairs (2402.05369): L = -ls(beta u_w) - ls(-beta u_w)/2 - ls(-beta u_l)/2."""

    Config = BetaConfig
    config: BetaConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        x, y = self.config.beta * w.u, self.config.beta * l.u
        return -logsigmoid(x) - 0.5 * logsigmoid(-x) - 0.5 * logsigmoid(-y)


class BCOPair(PairObjective):
    """BCO on pairs without a shift (2404.04656): L = -ls(beta u_w) - ls(-beta u_l), an upper bound of DPO."""

    Config = BetaConfig
    config: BetaConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * w.u) - logsigmoid(-self.config.beta * l.u)


class SPPOHard(PairObjective):
    """SPPO with hard labels (2405.00675): L = (u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2 (twice the paper's, as TRL)."""

    Config = BetaConfig
    config: BetaConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        aim = 0.5 / self.config.beta
        return (w.u - aim).square() + (l.u + aim).square()


class AOTConfig(BetaConfig):
    """Settings of AOT."""

    eps: float = Field(0.0, ge=0, lt=0.5, description="label smoothing of the logistic loss, as in cdpo")


class AOT(PairObjective):
    """AOT on pairs (2406.05882): the loss of DPO on sort(s_w - s_l) - sort(ref_w - ref_l) over the batch.

    Not linear in the batch: gather micro-batches before the loss. A pair's weight travels with its policy margin.
    """

    Config = AOTConfig
    config: AOTConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        assert w.ref is not None and l.ref is not None
        return self._logistic((w.s - l.s).sort(stable=True).values - (w.ref - l.ref).sort(stable=True).values)

    def item_weight(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return (w.weight * l.weight)[(w.s - l.s).detach().argsort(stable=True)]

    def _logistic(self, margin: torch.Tensor) -> torch.Tensor:
        z, eps = self.config.beta * margin, self.config.eps
        return -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)


class AOTUnpaired(AOT):
    """AOT on the two marginals (2406.05882): the loss of DPO on sort(u_w) - sort(u_l) over the batch."""

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return self._logistic(w.u.sort(stable=True).values - l.u.sort(stable=True).values)

    def item_weight(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return w.weight[w.u.detach().argsort(stable=True)] * l.weight[l.u.detach().argsort(stable=True)]


class APOZero(PairObjective):
    """APO-zero (2408.06266), for a chosen sequence better than the policy's own: L = 1 - sg(beta u_w) + sg(beta u_l)."""

    Config = BetaConfig
    config: BetaConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return torch.sigmoid(-self.config.beta * w.u) + torch.sigmoid(self.config.beta * l.u)


class APODown(PairObjective):
    """APO-down (2408.06266), for a chosen sequence worse than the policy's own: L = sg(beta u_w) + 1 - sg(z)."""

    Config = BetaConfig
    config: BetaConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return torch.sigmoid(self.config.beta * w.u) + torch.sigmoid(-self.config.beta * (w.u - l.u))


class DiscoPOPConfig(BetaConfig):
    """Settings of DiscoPOP."""

    tau: float = Field(0.05, gt=0, description="temperature of the switch between the two losses")


class DiscoPOP(MarginObjective):
    """DiscoPOP (2406.08414): L = -ls(z) (1-M) + e^{-z} M, M = sg(z / tau).

    At z = 0, where training starts, its slope has the wrong sign (+0.784 at tau 0.05): a full-batch run falls into the
    local minimum at negative z.
    """

    Config = DiscoPOPConfig
    config: DiscoPOPConfig

    def of_margin(self, margin: torch.Tensor) -> torch.Tensor:
        z, tau = self.config.beta * margin, self.config.tau
        # one exponent: e^{-z} alone overflows where M underflows
        return -logsigmoid(z) * torch.sigmoid(-z / tau) + soft_exp(-z + logsigmoid(z / tau))


class SigmoidNorm(PairObjective):
    """Length-normalised DPO (2411.15124): L = -ls(beta (ub_w - ub_l))."""

    Config = BetaConfig
    config: BetaConfig
    quantity = "ub"

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.ub - l.ub))


class FDPOConfig(BetaConfig):
    """Settings of f-DPO."""

    divergence: Literal["forward-kl", "js", "alpha", "reverse-kl"] = Field(
        "forward-kl", description="divergence from the reference that is penalised; reverse-kl is plain DPO"
    )
    alpha: float = Field(0.5, gt=0, description="order of the alpha divergence; 1 is the reverse KL")
    objective: str = Field("dpo", description="objective of the margin that gets the transformed log-ratios")
    settings: dict[str, Any] = Field(default_factory=dict, description="further settings of that objective")


class FDPO(PairObjective):
    """f-DPO (2309.16240): an objective of D = f'(w) - f'(l) in place of u_w - u_l.

    f' of the ratio e^u, up to a constant: forward KL 1 - e^{-u}; Jensen-Shannon log 2 + ls(u);
    alpha (e^{(alpha-1) u} - 1) / (alpha - 1). The exponential is continued linearly from e^30.
    """

    Config = FDPOConfig
    config: FDPOConfig

    def setup(self) -> None:
        base = registry.create("objective", self.config.objective, beta=self.config.beta, **self.config.settings)
        if not isinstance(base, MarginObjective):
            raise ConfigError(f"FDPO: objective: must be one of the margin alone (dpo, hinge, ...), got {self.config.objective!r}")
        self.base = base

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return self.base.of_margin(self.derivative(w.u) - self.derivative(l.u))

    def derivative(self, u: torch.Tensor) -> torch.Tensor:
        """f' of log-ratios."""
        kind, alpha = self.config.divergence, self.config.alpha
        if kind == "forward-kl":
            return 1 - soft_exp(-u)
        if kind == "js":
            return math.log(2) + logsigmoid(u)
        return u if kind == "reverse-kl" or alpha == 1 else (soft_exp((alpha - 1) * u) - 1) / (alpha - 1)


class RDPOConfig(BetaConfig):
    """Settings of R-DPO."""

    alpha: float = Field(0.2, ge=0, description="penalty of a token of length, inside the sigmoid")


class RDPO(PairObjective):
    """Length-regularised DPO (2403.19159): L = -ls(z + alpha (n_w - n_l))."""

    Config = RDPOConfig
    config: RDPOConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.u - l.u) + self.config.alpha * (w.n - l.n))


class DPOPConfig(BetaConfig):
    """Settings of DPO-Positive."""

    lam: float = Field(5.0, ge=0, description="penalty of a chosen sequence below its reference (paper: 5 to 50)")


class DPOP(PairObjective):
    """DPO-Positive (2402.13228): L = -ls(beta (D - lam max(0, -u_w)))."""

    Config = DPOPConfig
    config: DPOPConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.u - l.u - self.config.lam * (-w.u).clamp(min=0)))


class RPOConfig(BetaConfig):
    """Settings of RPO."""

    alpha: float = Field(1.0, ge=0, description="weight of the mean log-likelihood of the chosen sequence")


class RPO(PairObjective):
    """DPO with the likelihood of the chosen sequence (2404.19733): L = -ls(z) - alpha a_w."""

    Config = RPOConfig
    config: RPOConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.u - l.u)) - self.config.alpha * w.a


class LDDPOConfig(BetaConfig):
    """Settings of LD-DPO."""

    alpha: float = Field(0.5, ge=0, le=1, description="weight of the tokens beyond the shorter sequence's length; 1 is DPO")


class LDDPO(PairObjective):
    """Length-desensitised DPO (2409.06411): DPO on sums that count tokens beyond min(n_w, n_l) with weight alpha.

    The weights act on tokens, so whoever sums them applies `token_weights` to policy and reference alike, and states so in
    the column `weighted_length` of `extra`: the sum of the weights of each sequence, which is checked.
    """

    needs = ("group", "role", "ref_logp", "weighted_length")
    Config = LDDPOConfig
    config: LDDPOConfig

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return -logsigmoid(self.config.beta * (w.u - l.u))

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.group is not None
        right = self.token_weights(batch.length, batch.group).sum(1)
        given = batch.extra["weighted_length"].to(right.dtype)
        if not torch.allclose(given, right, rtol=1e-4):
            row = int((given - right).abs().argmax())
            raise InputError(f"weighted_length: logp must be summed with token_weights, {right[row]:g} in all, got {given[row]:g}")
        return super().items(batch)

    def token_weights(self, length: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Weights of the tokens, float32 [S, T] with T the longest length: 1, then alpha, then 0 beyond the end.

        length: int64 [S]. group: int64 [S].
        """
        index, taken = grouped(group)
        far = int(length.max()) + 1
        shortest = torch.where(taken, length[index], far).min(1).values
        common = torch.zeros_like(length)
        common[index[taken]] = shortest.repeat_interleave(taken.sum(1))
        place = torch.arange(far - 1, device=length.device)
        inside = torch.where(place < common[:, None], 1.0, self.config.alpha)
        return torch.where(place < length[:, None], inside, 0.0)


class WPOConfig(MethodConfig):
    """Settings of WPO."""

    objective: str = Field("dpo", description="pair objective that is weighted")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of that objective")


class WPO(PairObjective):
    """WPO (2406.11827): any pair objective times w_w w_l, w = exp(mean_t(l_t - log sum_v p_v^2)), no gradient.

    The column `wpo_weight` of `extra` holds w of each sequence, see `wpo_weight`.
    """

    Config = WPOConfig
    config: WPOConfig

    def setup(self) -> None:
        base = registry.create("objective", self.config.objective, **self.config.settings)
        if not isinstance(base, PairObjective):
            raise ConfigError(f"WPO: objective: must be a pair objective, got {self.config.objective!r}")
        self.base = base
        self.needs = (*base.needs, "wpo_weight")

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        own = batch.extra["wpo_weight"].detach().to(batch.logp.dtype)
        return self.base.items(replace(batch, weight=weights(batch) * own))

    def pair(self, w: Side, l: Side) -> torch.Tensor:  # noqa: E741
        return self.base.pair(w, l)


def wpo_weight(token_logp_ST: torch.Tensor, log_sum_p2_ST: torch.Tensor, mask_ST: torch.Tensor) -> torch.Tensor:
    """WPO's weight of each sequence, [S]: exp of the mean over its tokens of l_t - log sum_v p_v^2 (2406.11827, eq. 6).

    token_logp: float [S, T]. log_sum_p2: float [S, T], log of the sum of squared probabilities (-Renyi entropy of order
    2). mask: bool [S, T], the completion's tokens.
    """
    excess = torch.where(mask_ST, token_logp_ST - log_sum_p2_ST, 0.0).sum(1) / mask_ST.sum(1).clamp(min=1)
    return excess.exp().detach()
