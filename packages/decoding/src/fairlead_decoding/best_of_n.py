"""Best-of-n and worst-of-n: draw n answers, return the one that the reward likes best, or least.

Best-of-n of a model p has the distribution pi_n(y) = p(y) / p(ties of y) [F(y)^n - F-(y)^n] (arXiv 2401.01879); its KL to
p is estimated from the probability of what was chosen (`theory.bon_kl_estimate`), or bounded by ln n - (n - 1) / n where
sampling is truncated. Worst-of-n is the attacker who keeps the answer with the lowest reward (arXiv 2412.19792).
All n draws are kept, and from them the unbiased mean reward for every n' <= n is told in `figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request, best, draw
from fairlead.generation import Generation
from fairlead.kinds import Decoder

from . import theory


class BestOfNConfig(MethodConfig):
    """Settings of best-of-n."""

    n: int = Field(4, ge=1, description="answers drawn for each prompt")


class BestOfN(Decoder):
    """The answer with the highest reward among n, the first on ties."""

    Config = BestOfNConfig
    config: BestOfNConfig
    needs_reward = True

    @property
    def rows_per_prompt(self) -> int:
        return self.config.n

    def decode(self, request: Request) -> list[Answer]:
        return [self._answer(group, request) for group in draw(request, self.config.n)]

    def pick(self, group: Sequence[Generation]) -> int:
        """Index of the answer to return."""
        return best(group)

    def curve(self, rewards_PK: np.ndarray, n: int) -> float:
        """Mean reward of this rule with n draws, from K >= n draws for each of P prompts."""
        return float(theory.best_of_n_reward(rewards_PK, n).mean())

    def figures(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """reward_by_n: unbiased mean reward for n' = 1..n from the same draws; kl_bound_by_n beside it."""
        drawn = min((len(a.candidates) for a in answers), default=0)
        if not drawn:
            return {}
        rewards_PK = np.array([[g.reward for g in a.candidates[:drawn]] for a in answers], dtype=np.float64)
        counts = range(1, drawn + 1)
        return {
            "reward_by_n": [self.curve(rewards_PK, n) for n in counts],
            "kl_bound_by_n": [float(theory.bon_kl_bound(n)) for n in counts],
        }

    def _answer(self, group: list[Generation], request: Request) -> Answer:
        chosen, n = self.pick(group), len(group)
        if request.temperature == 0:
            return Answer(group, chosen, 0.0, "exact")  # greedy draws are one answer
        if request.truncates or request.watermark is not None:
            return Answer(group, chosen, float(theory.bon_kl_bound(n)), "bound")
        logprobs = group[chosen].logprobs
        assert logprobs is not None
        return Answer(group, chosen, float(theory.bon_kl_estimate(float(logprobs.double().sum()), n)), "estimate")


class WorstOfN(BestOfN):
    """The answer with the lowest reward among n, the first on ties: what an adversary with n tries gets."""

    def pick(self, group: Sequence[Generation]) -> int:
        return min(range(len(group)), key=lambda j: (group[j].reward, j))

    def curve(self, rewards_PK: np.ndarray, n: int) -> float:
        return -float(theory.best_of_n_reward(-rewards_PK, n).mean())
