"""How close a response's length comes to a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from ..config import MethodConfig
from ..kinds.reward import Reward, check_pairs


class LengthConfig(MethodConfig):
    """Settings of the length reward."""

    target: int = Field(100, ge=1, description="length that gets the reward 0, the largest")
    unit: Literal["words", "characters"] = Field("words", description="what is counted")


class LengthReward(Reward):
    """-|length - target| / target."""

    Config = LengthConfig
    config: LengthConfig
    granularity = "prefix"

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        target = self.config.target
        lengths = [len(str(r).split()) if self.config.unit == "words" else len(str(r)) for r in responses]
        return torch.tensor([-abs(n - target) / target for n in lengths], dtype=torch.float32)
