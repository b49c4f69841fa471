"""BCO: a binary classifier whose logit is the implicit reward, on unpaired data (arXiv 2404.04656).

r = beta u; L = mean_up[-ls(r - delta)] + mean_down[-w ls(-(r - delta))], delta = the mean of the two class means of r,
without gradient, which minimises the error term of BCO's bound of DPO. w, the weight column, is the density ratio of the
prompts (1 for wanted rows); `fairlead_training.density_ratio` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from fairlead.errors import InputError
from fairlead.kinds import Objective, SequenceStats

from .common import BetaConfig, by_label, weights
from .unpaired import UNPAIRED, by_class, labels, over_ranks


class BCOConfig(BetaConfig):
    """Settings of BCO."""

    delta: float | Literal["ema", "batch", "cumulative"] = Field(
        "ema",
        description="reward shift: exponential mean of the batches' midpoints, the batch's own, the mean of all rewards seen "
        "(as TRL had it), or a fixed number in units of the reward",
    )
    rho: float = Field(0.9, ge=0, lt=1, description="what the exponential mean keeps of itself at each batch")
    reduction: Literal["class_mean", "sample_mean"] = Field(
        "class_mean", description="sum of the two class means (paper), or the mean over all rows (as TRL had it)"
    )
    up_weight: float = Field(1.0, ge=0, description="weight of wanted sequences")
    down_weight: float = Field(1.0, ge=0, description="weight of unwanted sequences")
    self_normalised: bool = Field(
        False, description="a mean divides by the sum of the rows' weights (density ratios), not by the number of rows"
    )


class BCO(Objective):
    """One item per sequence. The shift is updated before use, while `training`, and kept in `state_dict`.

    A batch of one class is legal: the other adds nothing, and only "cumulative" moves. Under a running shift the loss
    depends on the batch, so micro-batches do not add up to their whole.
    """

    needs = UNPAIRED
    Config = BCOConfig
    config: BCOConfig

    def setup(self) -> None:
        fixed = self.config.delta if isinstance(self.config.delta, float) else 0.0
        self._state = {"delta": fixed, "rewards": 0.0, "updates": 0.0}

    def items(self, batch: SequenceStats) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.ref_logp is not None
        if batch.weight is not None and bool((batch.weight < 0).any()):
            raise InputError(f"weight: a density ratio is not negative, got {float(batch.weight.min()):g}")
        up, r = labels(batch), self.config.beta * (batch.logp - batch.ref_logp.detach())
        if self.training and isinstance(self.config.delta, str):
            self._update(r.detach().to(torch.float64), up)
        delta = self._state["delta"]
        scale = by_label(up, self.config.up_weight, self.config.down_weight, r.dtype)
        losses = -logsigmoid(by_label(up, 1.0, -1.0, r.dtype) * (r - delta)) * scale * weights(batch)
        return losses, {"bco/delta": delta, **by_class(r, up)}

    def reduce(self, per_item: torch.Tensor, batch: SequenceStats) -> torch.Tensor:
        counted = weights(batch) if self.config.self_normalised else torch.ones_like(per_item)
        up = labels(batch)
        loss = per_item.new_zeros(())
        for mask in (up, ~up) if self.config.reduction == "class_mean" else (torch.ones_like(up),):
            total = torch.where(mask, counted, 0.0).sum()
            loss = loss + torch.where(mask, per_item, 0.0).sum() / torch.where(total > 0, total, 1.0)
        return loss

    def _update(self, r: torch.Tensor, up: torch.Tensor) -> None:
        """Take the rewards of a batch, of all processes, into the shift."""
        sums = [part for mask in (up, ~up) for part in (torch.where(mask, r, 0.0).sum(), mask.sum().to(r.dtype))]
        up_sum, up_count, down_sum, down_count = over_ranks(torch.stack(sums)).tolist()
        state, kind = self._state, self.config.delta
        if kind == "cumulative":
            seen = state["rewards"] + up_count + down_count
            state["delta"] += (up_sum + down_sum - (up_count + down_count) * state["delta"]) / seen
            state["rewards"] = seen
        elif up_count and down_count:
            middle = (up_sum / up_count + down_sum / down_count) / 2
            kept = self.config.rho if kind == "ema" and state["updates"] else 0.0
            state["delta"] = kept * state["delta"] + (1 - kept) * middle
            state["updates"] += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._state):
            raise InputError(f"BCO: state must hold {', '.join(self._state)}, got {', '.join(sorted(state)) or 'nothing'}")
        self._state = {name: float(value) for name, value in state.items()}
