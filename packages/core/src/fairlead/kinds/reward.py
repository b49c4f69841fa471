"""Kind Reward: says how good a response is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import Configurable

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
