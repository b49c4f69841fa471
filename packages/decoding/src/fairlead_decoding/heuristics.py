"""Objectives in words for search: which of the required words a text has, whether it keeps to a length.

Both judge the answer alone (a keyword in the prompt counts for nothing) and may be asked about unfinished text. Sources: the
programmatic heuristics of DeAL (arXiv 2402.06147).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from fairlead.config import MethodConfig
from fairlead.kinds import Reward
from fairlead.kinds.reward import check_pairs

_WORD = re.compile(r"\w+")


class KeywordCoverageConfig(MethodConfig):
    """Settings of keyword coverage."""

    keywords: list[str] = Field(default_factory=lambda: ["the"], description="words that the answer must contain")
    match: Literal["exact", "prefix"] | Callable[[str], str] = Field(
        "prefix", description="exact word; a word that starts with the keyword; or a function word -> lemma"
    )
    hard: bool = Field(False, description="1 only when every keyword is there, instead of the share of them")

    @field_validator("keywords")
    @classmethod
    def _words(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("must hold at least one word")
        for word in value:
            if not _WORD.fullmatch(word):
                raise ValueError(f"must be single words, got {word!r}")
        return value


class KeywordCoverage(Reward):
    """Share of the required words that the response has, each counted once, case ignored."""

    Config = KeywordCoverageConfig
    config: KeywordCoverageConfig
    granularity = "prefix"
    bounds = (0.0, 1.0)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        shares = torch.tensor([self._share(str(r)) for r in responses], dtype=torch.float32)
        return (shares == 1).float() if self.config.hard else shares

    def _share(self, text: str) -> float:
        words = {word.lower() for word in _WORD.findall(text)}
        keywords = [k.lower() for k in self.config.keywords]
        match = self.config.match
        if match == "exact":
            found = sum(k in words for k in keywords)
        elif callable(match):
            lemmas = {match(word) for word in words}
            found = sum(match(k) in lemmas for k in keywords)
        else:
            found = sum(any(word.startswith(k) for word in words) for k in keywords)
        return found / len(keywords)


class LengthLimitConfig(MethodConfig):
    """Settings of the length limit."""

    words: int = Field(50, ge=1, description="most words (split at white space)")
    graded: bool = Field(True, description="-(words beyond the limit) / limit; else 1 for a finished answer within it, 0 otherwise")


class LengthLimit(Reward):
    """Keeps an answer within a number of words."""

    Config = LengthLimitConfig
    config: LengthLimitConfig
    granularity = "prefix"

    def setup(self) -> None:
        self.bounds = None if self.config.graded else (0.0, 1.0)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        limit = self.config.words
        counts = [len(str(r).split()) for r in responses]
        if self.config.graded:
            return torch.tensor([-max(0, count - limit) / limit for count in counts], dtype=torch.float32)
        ends = [True] * len(counts) if finished is None else finished
        return torch.tensor([float(bool(end) and count <= limit) for count, end in zip(counts, ends, strict=True)], dtype=torch.float32)
