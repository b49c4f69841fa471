"""GenARM: a reward model in the form of a language model, whose next-token log-probs guide another.

Xu et al. (arXiv 2410.08193): pi*(z | s) prop. to pi(z | s) pi_r(z | s)^(1 / beta). With a `reference` the value is the
log-ratio log pi_r - log pi_ref, so that two checkpoints of any preference-tuned pair act as an implicit reward; with beta = 1 on
top of the reference itself that gives back pi_r exactly. All tokens are candidates; nothing is rolled out.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fairlead.decoding import Request
from fairlead.errors import InputError
from fairlead.models import causal_lm

from .token_search import TokenSearch, TokenSearchConfig
from .values import Implicit, Value


class GenARMConfig(TokenSearchConfig):
    """Settings of GenARM."""

    top_k: int | None = Field(None, ge=1, description="candidate tokens at each step; none: the vocabulary")
    reward_model: Any = Field(None, description="autoregressive reward model: a causal LM, folder, hub id or zoo:NAME")
    reference: Any = Field(None, description="causal LM whose log-probs are subtracted; none: none are")
    beta: float = Field(1.0, gt=0, allow_inf_nan=False, description="1 / weight of the reward model")


class GenARM(TokenSearch):
    """Guidance by the next-token log-probs of a reward model."""

    Config = GenARMConfig
    config: GenARMConfig
    needs_reward = False

    @property
    def weight(self) -> float:
        return 1.0 / self.config.beta

    @property
    def rows_per_prompt(self) -> int:
        return 1

    @property
    def models_in_step(self) -> int:
        return 2 + (self.config.reference is not None)

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        if self.config.reward_model is None:
            raise InputError("GenARM: reward_model is required: a causal LM, a folder, hub id or zoo:NAME")
        if getattr(self, "_models", None) is None:
            self._models = [
                None if value is None else causal_lm(value, beside=model, role=role)
                for role, value in (("reward_model", self.config.reward_model), ("reference", self.config.reference))
            ]
        return reward

    def value(self, request: Request) -> Value:
        return Implicit(*self._models)
