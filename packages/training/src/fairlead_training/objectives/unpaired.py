"""KTO: unpaired thumbs-up and thumbs-down against a moving zero point (arXiv 2402.01306).

L = w_up (1 - sg(beta (u - z0))) for wanted sequences, w_down (1 - sg(beta (z0 - u))) for unwanted ones, z0 without
gradient. z0 is in units of the log-ratio (BCO's shift, in bco.py, is in units of the reward).
"""

from __future__ import annotations

import torch
from pydantic import Field

from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import BetaConfig, by_label, weights

UNPAIRED = ("role", "ref_logp")


def labels(batch: SequenceStats) -> torch.Tensor:
    """Whether each sequence is wanted, bool [S]; InputError for one that is neither."""
    assert batch.role is not None
    if bool((batch.role == 0).any()):
        raise InputError("role: unpaired data has wanted (1, True) and unwanted (-1, False) sequences only, got 0")
    return batch.role == 1


def by_class(reward: torch.Tensor, up: torch.Tensor) -> dict[str, float]:
    """Mean rewards of the two classes, where there are any."""
    found = {name: reward.detach()[mask] for name, mask in (("rewards/chosen", up), ("rewards/rejected", ~up))}
    return {name: float(values.mean()) for name, values in found.items() if values.numel()}


def over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums over the processes of a distributed run; the values themselves in a single one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        on_gpu = torch.distributed.get_backend() == "nccl"  # which knows no tensor of the CPU
        shared = values.cuda() if on_gpu else values
        torch.distributed.all_reduce(shared)
        return shared.to(values.device)
    return values


class KTOConfig(BetaConfig):
    """Settings of KTO."""

    desirable_weight: float = Field(1.0, ge=0, description="weight of wanted sequences")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of unwanted sequences")
    z0: float | None = Field(None, description="fixed zero point in nats; by default it comes from mismatched pairs")


class KTO(Objective):
    """One item per sequence.

    z0 = max(0, mean of the column `mismatched_ratio` of `extra`): u of each prompt with the completion before it in the
    batch (cyclic), over all processes. It depends on the batch, so micro-batches do not add up to their whole.
    """

    needs: tuple[str, ...] = UNPAIRED
    Config = KTOConfig
    config: KTOConfig

    def setup(self) -> None:
        if self.config.z0 is None:
            self.needs = (*UNPAIRED, "mismatched_ratio")

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.ref_logp is not None
        up, u = labels(batch), batch.logp - batch.ref_logp.detach()
        z0 = self.zero_point(batch)
        sign = by_label(up, 1.0, -1.0, u.dtype)
        scale = by_label(up, self.config.desirable_weight, self.config.undesirable_weight, u.dtype)
        losses = scale * torch.sigmoid(-self.config.beta * sign * (u - z0))
        return losses * weights(batch), {"kl": z0, **by_class(self.config.beta * u, up)}

    def zero_point(self, batch: SequenceStats) -> float:
        """z0, in nats."""
        if self.config.z0 is not None:
            return self.config.z0
        found = batch.extra["mismatched_ratio"].detach().to(torch.float64)
        total, count = over_ranks(torch.stack([found.sum(), torch.ones_like(found).sum()])).tolist()
        return max(0.0, total / count)
