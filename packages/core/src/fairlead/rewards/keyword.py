"""Words that a response should, or should not, hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from ..config import MethodConfig
from ..kinds.reward import Reward, check_pairs


class KeywordConfig(MethodConfig):
    """Settings of the keyword reward."""

    weights: dict[str, float] = Field(default_factory=dict, description="word or phrase -> what each occurrence adds")
    once: bool = Field(False, description="count each word once per response, however often it stands there")


class KeywordReward(Reward):
    """Sum over words of weight x occurrences, whole words, case ignored."""

    Config = KeywordConfig
    config: KeywordConfig
    granularity = "prefix"

    def setup(self) -> None:
        self._patterns = [
            (re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE), weight)
            for word, weight in self.config.weights.items()
        ]

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        return torch.tensor([self._score(str(r)) for r in responses], dtype=torch.float32)

    def _score(self, response: str) -> float:
        total = 0.0
        for pattern, weight in self._patterns:
            count = sum(1 for _ in pattern.finditer(response))
            total += weight * (min(count, 1) if self.config.once else count)
        return total
