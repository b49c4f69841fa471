"""A reward as its quantile among reference responses to the same prompt.

c(x, y) = P(r(x, y') <= r(x, y)) over K reference responses y' (Balashankar et al., arXiv 2412.19792): uniform on [0, 1]
under the reference, so rewards of different prompts become comparable. Ties count half (mid-rank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator

from ..config import MethodConfig
from ..errors import InputError
from ..kinds.reward import Reward, as_reward, check_pairs


class CalibratedConfig(MethodConfig):
    """Settings of the calibrated reward."""

    reward: Any = Field("length", description="Reward, callable, registered name or {name, settings}")
    references: Mapping[str, list[str]] = Field(
        default_factory=dict, description="prompt -> reference responses; the empty prompt serves those without their own"
    )

    @field_validator("reward", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_reward(value)


class CalibratedReward(Reward):
    """Mid-rank quantile in [0, 1]; the references of a prompt are scored once."""

    Config = CalibratedConfig
    config: CalibratedConfig
    bounds = (0.0, 1.0)

    def setup(self) -> None:
        self._tables: dict[str, torch.Tensor] = {}

    def _table(self, prompt: str) -> torch.Tensor:
        if prompt not in self._tables:
            references = self.config.references.get(prompt, self.config.references.get("", []))
            if not references:
                raise InputError(f"calibrated reward: no reference responses for the prompt {prompt[:60]!r}")
            self._tables[prompt] = self.config.reward([prompt] * len(references), references).sort().values
        return self._tables[prompt]

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        scores = self.config.reward(prompts, responses, finished, **columns)
        quantiles = []
        for prompt, score in zip(prompts, scores, strict=True):
            table = self._table(str(prompt))
            below, upto = torch.searchsorted(table, score), torch.searchsorted(table, score, right=True)
            quantiles.append(float(below + upto) / (2 * len(table)))
        return torch.tensor(quantiles, dtype=torch.float32)
