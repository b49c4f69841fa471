"""DeAL: decoding as search, each candidate token judged after a short look-ahead.

Huang et al. (arXiv 2402.06147). The prompt is adapted by an instruction that states the objective; then, for the k most
probable next tokens c, each extended greedily by l tokens,

  S(c) = log P(y_1..t | p) + lam h(y_1..t+l, p),   y_t = c,   h = sum_j w_j h_j

where the log-probability is the sum over the answer so far and c, look-ahead excluded. beam = 1 keeps the argmax; a beam of
b keeps the b best of all extensions, finished ones leave it, and the best finished by S is returned. A keyword whose first
token is not among the k likeliest never enters. With lam = 0 and beam 1 it is greedy decoding, token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from fairlead.decoding import Request
from fairlead.errors import InputError
from fairlead.generation import Generation
from fairlead.kinds import Reward
from fairlead.kinds.reward import as_rewards, check_pairs

from .token_search import TokenSearch, TokenSearchConfig
from .values import Rollouts, Value


class DeALConfig(TokenSearchConfig):
    """Settings of DeAL."""

    heuristics: list[Any] = Field(default_factory=list, description="objectives: Rewards, callables, registered names or {name, settings}")
    weights: list[float] | None = Field(None, description="one for each heuristic; default 1 each")
    lam: float = Field(1.0, ge=0, allow_inf_nan=False, description="weight of the heuristics against the log-probability")
    top_k: int = Field(8, ge=1, description="candidate tokens at each step")
    lookahead: int = Field(16, ge=0, description="tokens of greedy look-ahead")
    beam: int = Field(1, ge=1, description="answers kept at each step")
    instruction: str | None = Field(None, description="states the objective before the prompt (a system message for a chat)")
    trim: bool = Field(False, description="judge unfinished text up to its last whole word")

    @field_validator("heuristics", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        return as_rewards(value if isinstance(value, (list, tuple)) else [value])

    @model_validator(mode="after")
    def _fits_together(self) -> DeALConfig:
        if self.weights is not None and len(self.weights) != len(self.heuristics):
            raise ValueError(f"weights: {len(self.weights)} are given for {len(self.heuristics)} heuristics; one for each is needed")
        if self.weights is not None and self.weights and not any(self.weights):
            raise ValueError("weights: are all zero; at least one must not be")
        if self.beam > 1 and self.mode == "sample":
            raise ValueError("mode: a beam is searched greedily; use beam=1 to sample")
        return self


class DeAL(TokenSearch):
    """Heuristic search with greedy look-ahead."""

    Config = DeALConfig
    config: DeALConfig

    def setup(self) -> None:
        self.beam = self.config.beam
        self._judge: _Objectives | None = None

    @property
    def weight(self) -> float:
        return self.config.lam

    @property
    def plain(self) -> dict[str, Any]:
        return super().plain if self.beam == 1 else {"temperature": 0.0, "beam": self.beam}

    def start(self, prompt: Any) -> Any:
        if self.config.instruction is None:
            return prompt
        if isinstance(prompt, str):
            return f"{self.config.instruction}\n\n{prompt}"
        if isinstance(prompt, torch.Tensor):
            raise InputError("DeAL: an instruction goes before text; give prompts as text, or no instruction")
        return [{"role": "system", "content": self.config.instruction}, *prompt]

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        parts = [*self.config.heuristics, *([] if reward is None else [reward])]
        if not parts and self.config.lam > 0:
            raise InputError("DeAL: heuristics are required (or lam=0): Rewards, functions of (prompts, responses) or registered names")
        weights = [*(self.config.weights or [1.0] * len(self.config.heuristics)), *([] if reward is None else [1.0])]
        self._judge = _Objectives(parts, weights, self.config.trim)
        return super().prepare(model, tokenizer, self._judge)

    def value(self, request: Request) -> Value:
        return Rollouts(self.config.lookahead, width=self.beam)

    def told(self, request: Request, place: int, generation: Generation) -> dict[str, Any]:
        assert self._judge is not None
        key = self._judge.key(request.asked(place), request.texts([generation.ids])[0], generation.finished)
        return {"heuristics": self._judge.seen.get(key, [])}


class _Objectives(Reward):
    """sum_j w_j h_j, remembering the h_j of every text."""

    granularity = "prefix"

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], trim: bool) -> None:
        super().__init__()
        self.parts, self.weights, self.trim = parts, weights, trim
        self.accepts_ids = all(part.accepts_ids for part in parts)
        self.seen: dict[Any, list[float]] = {}
        if parts and all(part.bounds is not None for part in parts):
            ends = [sorted((w * part.bounds[0], w * part.bounds[1])) for w, part in zip(weights, parts, strict=True)]
            self.bounds = (sum(low for low, _ in ends), sum(high for _, high in ends))

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        ends = [True] * len(responses) if finished is None else list(finished)
        texts = [_whole_words(r) if self.trim and not end else r for r, end in zip(responses, ends, strict=True)]
        if not self.parts:
            return torch.zeros(len(texts))
        values_JN = torch.stack([part(prompts, texts, ends).double() for part in self.parts])
        for n, (prompt, response, end) in enumerate(zip(prompts, responses, ends, strict=True)):
            self.seen[self.key(prompt, response, end)] = values_JN[:, n].tolist()
        return (torch.tensor(self.weights, dtype=torch.float64) @ values_JN).float()

    @staticmethod
    def key(prompt: Any, response: Any, finished: bool) -> Any:
        """What tells one judged text from another."""
        parts = [tuple(v.tolist()) if isinstance(v, torch.Tensor) else str(v) for v in (prompt, response)]
        return (*parts, finished)


def _whole_words(text: Any) -> Any:
    return text if not isinstance(text, str) or not text or text[-1].isspace() else text.rpartition(" ")[0]
