"""Kind Guard: judges what a model said to a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import Configurable


@dataclass(frozen=True)
class Verdict:
    """One judgement. Refusal, coherence and helpfulness travel together: each number alone misleads.

    label: the guard's own class, such as "refuse", "correct", "sabotage". harmful: the prompt asked for harm (None
    when the guard cannot tell). unsafe: the answer does harm. refusal: the answer declines. coherent: it is an answer
    at all. helpful: in [0, 1], None where helpfulness is not defined (an answer to a harmful prompt).
    evidence: the words or rule that decided.
    """

    label: str
    unsafe: bool
    refusal: bool
    coherent: bool = True
    helpful: float | None = None
    harmful: bool | None = None
    evidence: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Guard(Configurable):
    """(prompts, responses) -> one Verdict per pair, in order; deterministic, batched, no model of the subject."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Judge N pairs; InputError when the lengths differ."""
