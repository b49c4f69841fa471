"""A reward that remembers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator

from ..config import MethodConfig
from ..kinds.reward import Reward, as_reward, check_pairs


class CachedConfig(MethodConfig):
    """Settings of the cache."""

    reward: Any = Field("length", description="Reward, callable, registered name or {name, settings}")
    size: int = Field(100_000, ge=1, description="pairs remembered; the least recently used go first")

    @field_validator("reward", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_reward(value)


class CachedReward(Reward):
    """The inner reward, asked once per distinct (prompt, response, finished) of text. `calls` counts pairs asked for,
    `misses` those computed. Calls with further columns go through uncached: the columns may matter."""

    Config = CachedConfig
    config: CachedConfig

    def setup(self) -> None:
        self.calls = 0
        self.misses = 0
        self._known: OrderedDict[tuple[Any, ...], float] = OrderedDict()
        self.bounds = self.config.reward.bounds
        self.granularity = self.config.reward.granularity

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        self.calls += len(responses)
        ends = [True] * len(responses) if finished is None else [bool(f) for f in finished]
        keys = [(str(p), str(r), f) for p, r, f in zip(prompts, responses, ends, strict=True)]
        if columns:
            self.misses += len(responses)
            scores: torch.Tensor = self.config.reward(prompts, responses, finished, **columns)
            return scores
        new = list(dict.fromkeys(k for k in keys if k not in self._known))
        found = {k: self._known[k] for k in keys if k in self._known}
        if new:
            self.misses += len(new)
            values = self.config.reward([k[0] for k in new], [k[1] for k in new], [k[2] for k in new])
            found.update(zip(new, values.tolist(), strict=True))
        for key in found:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self.config.size:
            self._known.popitem(last=False)
        return torch.tensor([found[k] for k in keys], dtype=torch.float32)
