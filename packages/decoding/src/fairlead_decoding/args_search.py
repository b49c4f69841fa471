"""ARGS: the reward of the bare prefix is added to each candidate's log-probability.

Khanov, Burapacheep, Li (arXiv 2402.01694): S(z) = log pi(z | s) + w r(x, [y, z]), greedy or sampled ("stochastic", top-k
with a temperature on the score). The reward must be able to judge a prefix; one that says it judges whole responses only is
warned of, for its guidance may be noise.
"""

from __future__ import annotations

import logging

from pydantic import Field

from fairlead.decoding import Request

from .token_search import TokenSearch, TokenSearchConfig
from .values import Rollouts, Value

log = logging.getLogger("fairlead")


class ARGSConfig(TokenSearchConfig):
    """Settings of ARGS."""

    w: float = Field(1.0, ge=0, allow_inf_nan=False, description="weight of the reward against the log-probability")


class ARGS(TokenSearch):
    """Reward-guided search without look-ahead."""

    Config = ARGSConfig
    config: ARGSConfig

    @property
    def weight(self) -> float:
        return self.config.w

    def value(self, request: Request) -> Value:
        if request.reward is not None and request.reward.reward.granularity != "prefix":
            log.info("args: %s judges whole responses; on prefixes its rewards may be noise", type(request.reward.reward).__name__)
        return Rollouts(0)
