"""A pattern that a response should match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator

from ..config import MethodConfig
from ..kinds.reward import Reward, check_pairs


class RegexConfig(MethodConfig):
    """Settings of the regex reward."""

    pattern: str = Field(".", description="Python regular expression, searched in the response")
    whole: bool = Field(False, description="the whole response must match")
    ignore_case: bool = Field(False, description="upper and lower case are one")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from None
        return value


class RegexReward(Reward):
    """1 where the pattern is found, else 0."""

    Config = RegexConfig
    config: RegexConfig
    bounds = (0.0, 1.0)

    def setup(self) -> None:
        compiled = re.compile(self.config.pattern, (re.IGNORECASE if self.config.ignore_case else 0) | re.DOTALL)
        self._find = compiled.fullmatch if self.config.whole else compiled.search

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        return torch.tensor([float(self._find(str(r)) is not None) for r in responses], dtype=torch.float32)
