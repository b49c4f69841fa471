"""Kind Selector: chooses which examples of a data set to train on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import Configurable
from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Selection:
    """What was chosen from N examples.

    indices: int64 [K], distinct, in the order of choice, the most wanted first. scores: named float64 [N] columns, one
    number per example of the data set, larger is more wanted; NaN where an example was not scored.
    """

    indices: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)

    def check(self, examples: int, budget: int) -> None:
        """InputError unless this is a selection of at most `budget` of `examples` examples."""
        if len(self.indices) > budget or len(set(self.indices.tolist())) != len(self.indices):
            raise InputError(f"a selection holds distinct indices, at most {budget}, got {len(self.indices)}")
        if len(self.indices) and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < examples:
            raise InputError(f"a selection's indices must lie in [0, {examples})")
        for name, column in self.scores.items():
            if column.shape != (examples,):
                raise InputError(f"scores {name!r}: shape {column.shape} for {examples} examples")


class Selector(Configurable):
    """(data set, budget) -> Selection.

    Contract
    --------
    - `dataset` is a sequence of rows with the columns of preference or instruction data (prompt, chosen, rejected,
      completion, label, messages); a `datasets.Dataset` and a list of dicts are both such sequences.
    - min(budget, N) indices, fewer only where the method's own threshold says so; budget 0 gives none.
    - Deterministic in (data set, budget, seed); equal scores are decided by the lower index.
    - Never changes the data set.
    """

    @abstractmethod
    def __call__(self, dataset: Sequence[Mapping[str, Any]], budget: int, *, seed: int = 0) -> Selection:
        """Choose; InputError for a negative budget or a column that is missing."""
