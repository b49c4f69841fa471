"""The worst of several rewards: good only where all are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator

from ..config import MethodConfig
from ..kinds.reward import Reward, as_rewards, check_pairs


class MinConfig(MethodConfig):
    """Settings of the minimum."""

    rewards: list[Any] = Field(default_factory=list, description="Rewards, callables, registered names or {name, settings}")

    @field_validator("rewards", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_rewards(value)


class MinReward(Reward):
    """min_i r_i; 0 where there is no reward."""

    Config = MinConfig
    config: MinConfig

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        if not self.config.rewards:
            return torch.zeros(len(responses), dtype=torch.float32)
        return torch.stack([r(prompts, responses, finished, **columns) for r in self.config.rewards]).amin(0)
