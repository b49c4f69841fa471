"""Kind Reward: says how good a response is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import Configurable
from ..errors import InputError

if TYPE_CHECKING:
    import torch


class Reward(Configurable):
    """(prompts, responses) -> one float per pair; larger is better.

    Contract
    --------
    - `reward(prompts, responses, finished=None, **columns)` takes N strings each (or N 1-D id tensors each, for
      rewards that say so with `accepts_ids = True`) and returns float32 [N] on the CPU, in input order, no NaN.
    - `finished` is bool [N] or None: False marks a prefix, for rewards whose `granularity` is "prefix".
    - `columns` are further columns of the data set, N values each (TRL's reward-function convention); unknown
      ones are ignored.
    - Deterministic: equal pairs get equal rewards, whatever the batch.
    - `bounds` is (low, high) where known, else None.
    """

    granularity: str = "final"
    accepts_ids: bool = False
    bounds: tuple[float, float] | None = None

    @abstractmethod
    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        """Rewards float32 [N]; InputError when the lengths differ."""

    def as_trl(self) -> Callable[..., list[float]]:
        """A function for TRL's `reward_funcs`: (prompts, completions, **columns) -> list of floats. Conversational
        prompts and completions are read as their last message."""

        def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
            scores = self([_text(p) for p in prompts], [_text(c) for c in completions], **columns)
            return [float(score) for score in scores]

        reward.__name__ = type(self).__name__
        return reward


def _text(value: Any) -> Any:
    """The content of the last message of a conversation; anything else as it is."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[-1], dict):
        return value[-1]["content"]
    return value


def question(prompt: Any) -> Any:
    """What a reward sees of a prompt: the last message of a chat, anything else as it is. Rewards judge the question, not
    the template."""
    return _text(prompt)


def check_pairs(prompts: Sequence[Any], responses: Sequence[Any]) -> None:
    """InputError unless there are as many responses as prompts."""
    if len(prompts) != len(responses):
        raise InputError(f"a reward needs one response per prompt, got {len(prompts)} prompts and {len(responses)} responses")


def as_reward(value: Any) -> Any:
    """A Reward from a Reward, a callable (prompts, responses), a registered name or {"name": ..., settings}."""
    if isinstance(value, Reward):
        return value
    if callable(value):
        from ..rewards.function import CallableReward

        return CallableReward(function=value)
    from .. import registry

    if isinstance(value, str):
        return registry.create("reward", value)
    if isinstance(value, Mapping) and "name" in value:
        return registry.create("reward", value["name"], **{k: v for k, v in value.items() if k != "name"})
    raise ValueError("must be a Reward, a callable, a registered name or {'name': ..., settings}")


def as_rewards(value: Any) -> list[Any]:
    """Rewards from a list of what `as_reward` takes."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list of rewards, got a {type(value).__name__}")
    return [as_reward(v) for v in value]
