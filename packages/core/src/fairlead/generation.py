"""Text generation with any Hugging Face causal LM: the data that flows and the one engine that makes it.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cost:
    """What a generation cost: tokens through the model, reward calls, seconds of wall clock."""

    model_tokens: int = 0
    reward_calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Generation:
    """One answer.

    prompt: as given (a string, or None when ids were given). text: decoded answer without special tokens.
    ids: int64 [T], the answer's tokens, end token included. logprobs: float32 [T] under the distribution the token
    was drawn from before any watermark, or None. finished: ended by itself rather than by the length limit.
    reward: the reward that chose it, or None. provenance: plain JSON values (seed, watermark, decoder, index, ...).
    """

    prompt: str | None
    text: str
    ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    finished: bool = True
    reward: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeResult:
    """What a decoder returns: one chosen generation per prompt, all candidates, KL to the model and its kind, cost."""

    generations: list[Generation]
    candidates: list[list[Generation]] = field(default_factory=list)
    kl: float | None = None
    kl_kind: str = ""
    cost: Cost = field(default_factory=Cost)
