"""Soft best-of-n: draw n answers, return answer j with probability softmax(r / alpha)_j.

As n grows this is the tilted distribution p exp(r / alpha) / Z, the optimum of E r - alpha KL; at alpha -> 0 it is
best-of-n, at alpha -> inf the model. The answer and a plain draw are one choice among the same n draws, so by convexity the
KL to the model is at most the mean of ln n + sum_j w_j ln w_j: the bound that is told, itself at most ln n.
"""

from __future__ import annotations

import math
import random

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request, draw
from fairlead.generation import Generation
from fairlead.kinds import Decoder


class SoftBestOfNConfig(MethodConfig):
    """Settings of soft best-of-n."""

    n: int = Field(4, ge=1, description="answers drawn for each prompt")
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="temperature of the choice, in units of the reward")


class SoftBestOfN(Decoder):
    """One of n answers, drawn with weights exp(reward / alpha)."""

    Config = SoftBestOfNConfig
    config: SoftBestOfNConfig
    needs_reward = True

    @property
    def rows_per_prompt(self) -> int:
        return self.config.n

    def decode(self, request: Request) -> list[Answer]:
        groups = draw(request, self.config.n, logprobs=False)
        return [self._answer(group, f"{request.seed} {index}") for group, index in zip(groups, request.indices, strict=True)]

    def _answer(self, group: list[Generation], noise: str) -> Answer:
        rewards = torch.tensor([g.reward for g in group], dtype=torch.float64)
        weights = (rewards / self.config.alpha).softmax(0)
        kl = math.log(len(group)) + float(torch.special.xlogy(weights, weights).sum())
        # Draws are exchangeable: among equal rewards the first has the law of any.
        chosen = 0 if rewards.min() == rewards.max() else random.Random(noise).choices(range(len(group)), weights.tolist())[0]
        return Answer(group, chosen, max(0.0, kl), "bound", extra={"weight": float(weights[chosen])})
