"""Kind Rewriter: turns a prompt into a better one before a model sees it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import Configurable


@dataclass(frozen=True)
class Rewrite:
    """One rewritten prompt.

    prompt: what the model is to see. original: what was asked. provenance: plain JSON values that say how one became
    the other (rule, guideline, model, seed).
    """

    prompt: str
    original: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.prompt != self.original


class Rewriter(Configurable):
    """prompts -> one `Rewrite` per prompt, in order.

    Contract
    --------
    - A prompt that needs no change comes back as it is, with `changed` False; never an empty string.
    - Deterministic in (prompt, seed), whatever the batch.
    - Sees prompts only: it neither calls the model that will answer nor reads its answers.
    """

    @abstractmethod
    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> list[Rewrite]:
        """Rewrite N prompts; InputError for a prompt that is no string."""
