"""Controlled decoding (Q-sft): tokens re-weighted by the reward of finishing the answer with the model itself.

Mudgal et al. (arXiv 2310.17022): pi*(z | s) prop. to pi(z | s) exp(Q(s, z) / alpha) with the value of the model's own
continuations, here estimated by roll-outs where the paper trains a value head. It is Transfer Q* with the model as its own
roll-out model, and named apart because it is the baseline that Transfer Q* improves on.
"""

from __future__ import annotations

import math

from pydantic import Field

from fairlead.decoding import Request

from .token_search import TokenSearch, TokenSearchConfig
from .values import Rollouts, Value


class ControlledDecodingConfig(TokenSearchConfig):
    """Settings of controlled decoding."""

    alpha: float = Field(1.0, gt=0, description="units of reward that one nat of deviation must earn; inf: the model itself")
    rollouts: int = Field(1, ge=1, description="continuations of each candidate: one is greedy, several are sampled")
    horizon: int = Field(32, ge=0, description="longest continuation in tokens")


class ControlledDecoding(TokenSearch):
    """Value-guided decoding with the model's own roll-outs."""

    Config = ControlledDecodingConfig
    config: ControlledDecodingConfig

    @property
    def weight(self) -> float:
        return 0.0 if math.isinf(self.config.alpha) else 1.0 / self.config.alpha

    @property
    def rows_per_prompt(self) -> int:
        return super().rows_per_prompt * self.config.rollouts

    def value(self, request: Request) -> Value:
        return Rollouts(self.config.horizon, self.config.rollouts, temperature=float(self.config.rollouts > 1))
