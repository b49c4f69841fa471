"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from ..config import MethodConfig
from ..kinds.reward import Reward, as_rewards, check_pairs


class WeightedConfig(MethodConfig):
    """Settings of the weighted sum."""

    rewards: list[Any] = Field(default_factory=list, description="Rewards, callables, registered names or {name, settings}")
    weights: list[float] | None = Field(None, description="one weight per reward; default 1 each")

    @field_validator("rewards", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_rewards(value)

    @model_validator(mode="after")
    def _same_count(self) -> WeightedConfig:
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(f"weights: {len(self.rewards)} needed, one per reward, got {len(self.weights)}")
        return self


class WeightedReward(Reward):
    """sum_i w_i r_i."""

    Config = WeightedConfig
    config: WeightedConfig

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        total = torch.zeros(len(responses), dtype=torch.float32)
        weights = self.config.weights or [1.0] * len(self.config.rewards)
        for reward, weight in zip(self.config.rewards, weights, strict=True):
            total += weight * reward(prompts, responses, finished, **columns)
        return total
