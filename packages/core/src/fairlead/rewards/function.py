"""Any Python function as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field

from ..config import MethodConfig
from ..errors import InputError
from ..kinds.reward import Reward, check_pairs


class CallableConfig(MethodConfig):
    """Settings of a reward made from a function."""

    function: Callable[..., Any] | None = Field(
        None, description="function (prompts, responses[, finished], **columns) -> one number per pair"
    )


class CallableReward(Reward):
    """`function(prompts, responses)` with its result checked: one number per pair. A function with an argument `finished`
    is told which responses are whole."""

    Config = CallableConfig
    config: CallableConfig
    accepts_ids = True

    def setup(self) -> None:
        if self.config.function is None:
            raise InputError("callable reward: function is required")
        parameters = list(inspect.signature(self.config.function).parameters.values())
        self._takes_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes_finished = any(p.name == "finished" for p in parameters)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        assert self.config.function is not None
        more = dict(columns) if self._takes_columns else {}
        if self._takes_finished:
            more["finished"] = [True] * len(responses) if finished is None else list(finished)
        values = self.config.function(prompts, responses, **more)
        scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu().reshape(-1)
        if len(scores) != len(responses):
            raise InputError(f"callable reward: gave {len(scores)} values for {len(responses)} responses")
        if bool(scores.isnan().any()):
            raise InputError(f"callable reward: gave NaN for pair {int(scores.isnan().nonzero()[0])}")
        return scores
