"""Transfer Q*: every token is re-weighted by the reward of finishing the answer with an already aligned model.

Chakraborty et al. (arXiv 2405.20495). With a proposal pi, a roll-out model rho and a reward r,

  pi*(z | s) prop. to pi(z | s) exp(Q(s, z) / alpha),   Q(s, z) = E_{y ~ rho(. | s, z)} r(x, y)

over the k likeliest tokens. Direct transfer: rho is aligned with r itself. Indirect: rho is aligned with another reward b, the
`baseline_reward`, at KL weight beta, and continuations are weighted by exp((r - b) / beta); see `values` for the estimators.
Log-probs are used where the released code adds rewards to raw logits: the same choices, comparable diagnostics. One
continuation is greedy, as published; several are sampled at temperature 1.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fairlead.decoding import Request
from fairlead.generation import Generation
from fairlead.kinds.reward import as_reward
from fairlead.models import causal_lm

from .token_search import TokenSearch, TokenSearchConfig
from .values import Rollouts, Value

log = logging.getLogger("fairlead")


class TransferQStarConfig(TokenSearchConfig):
    """Settings of Transfer Q*."""

    alpha: float = Field(1.0, gt=0, description="units of reward that one nat of deviation must earn; inf: the model itself")
    rollouts: int = Field(1, ge=1, description="continuations of each candidate")
    horizon: int = Field(32, ge=0, description="longest continuation in tokens; 0 scores the bare prefix")
    rollout: Any = Field(None, description="aligned causal LM that continues (a model, folder, hub id or zoo:NAME); none: the model itself")
    rollout_temperature: float | None = Field(None, ge=0, description="of the continuations; default 0 for one, 1 for several")
    estimator: Literal["mean", "self", "paper", "soft"] | None = Field(
        None, description="mean, or with a baseline_reward self (self-normalised weights), paper or soft; default mean or self"
    )
    baseline_reward: Any = Field(None, description="reward that the roll-out model was aligned with (indirect transfer)")
    beta: float = Field(1.0, gt=0, allow_inf_nan=False, description="KL weight of that alignment (indirect transfer, soft)")

    @field_validator("baseline_reward", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return None if value is None else as_reward(value)

    @model_validator(mode="after")
    def _fits_together(self) -> TransferQStarConfig:
        if self.estimator in ("self", "paper") and self.baseline_reward is None:
            raise ValueError(f"estimator {self.estimator!r} is that of indirect transfer, which needs a baseline_reward")
        if self.baseline_reward is not None and self.estimator == "mean":
            raise ValueError("estimator 'mean' ignores the baseline_reward; use self, paper or soft")
        if self.baseline_reward is not None and self.rollouts < 2:
            raise ValueError("rollouts: indirect transfer needs 2 or more, the weight of a single one is 1")
        if self.rollouts > 1 and self.horizon and self.rollout_temperature == 0:
            raise ValueError("rollout_temperature: several greedy continuations are one; use 1 rollout or a temperature above 0")
        return self


class TransferQStar(TokenSearch):
    """Value-guided decoding with roll-outs of an aligned model."""

    Config = TransferQStarConfig
    config: TransferQStarConfig

    @property
    def weight(self) -> float:
        return 0.0 if math.isinf(self.config.alpha) else 1.0 / self.config.alpha

    @property
    def rows_per_prompt(self) -> int:
        return super().rows_per_prompt * self.config.rollouts

    @property
    def models_in_step(self) -> int:
        return 1 if self.config.rollout is None or not self.config.horizon else 2

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        if self.config.rollout is not None and getattr(self, "_rollout_model", None) is None:
            self._rollout_model = causal_lm(self.config.rollout, beside=model, role="rollout")
        return super().prepare(model, tokenizer, reward)

    def value(self, request: Request) -> Value:
        c = self.config
        estimator = c.estimator or ("mean" if c.baseline_reward is None else "self")
        if estimator == "paper" and (request.reward is None or request.reward.bounds is None or request.reward.bounds[0] < 0):
            log.warning("transfer-q-star: the paper's estimator reverses its weights where the reward is negative; self does not")
        temperature = c.rollout_temperature if c.rollout_temperature is not None else float(c.rollouts > 1)
        return Rollouts(
            c.horizon, c.rollouts, model=getattr(self, "_rollout_model", None), temperature=temperature, estimator=estimator,
            baseline=c.baseline_reward, beta=c.beta,
        )  # fmt: skip

    def told(self, request: Request, place: int, generation: Generation) -> dict[str, Any]:
        mine = request.model is getattr(self, "_rollout_model", request.model)
        return {"rollout": "the model itself" if mine else _name(self._rollout_model), "proposal": _name(request.model)}


def _name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
