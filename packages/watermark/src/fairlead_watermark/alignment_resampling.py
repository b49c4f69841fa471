"""Alignment resampling: draw n marked answers, return the one that the reward likes best.

Verma, Phan, Trivedi, "Watermarking Degrades Alignment in Language Models" (arXiv 2506.04462): y_1..y_n iid from the
marked model with one key and fresh sampling noise, y = y_argmax r(x, y_i), ties to the lowest index. The returned answer
is tested like any other. The n candidates are one batched generation whose prompt is computed once; their rewards are
one batched call. Under Gaussian rewards the gain is at least C sqrt(ln n), see `bounds.resampling_gain`.
Plain Gumbel is deterministic given key and prompt: its candidates are equal and nothing is gained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from fairlead import registry
from fairlead.config import Configurable, MethodConfig
from fairlead.errors import InputError
from fairlead.generation import Cost, DecodeResult, Generation, generate
from fairlead.kinds import Reward, Watermark

from .bounds import kl_price


class AlignmentResamplingConfig(MethodConfig):
    """watermark, reward: objects, or {"name": ..., settings} for the registry; watermark None resamples unmarked text."""

    watermark: Any = Field(None, description="a Watermark, or its registered name and settings; none: unmarked")
    reward: Any = Field(None, description="a Reward or callable(prompts, responses), or its registered name and settings")
    n: int = Field(4, ge=1, description="candidates per prompt")
    selection: Literal["reward", "perplexity"] = Field(
        "reward", description="perplexity is the control: the likeliest candidate, which should not help"
    )

    @field_validator("watermark", mode="before")
    @classmethod
    def _build_watermark(cls, value: Any) -> Any:
        return _build("watermark", value, Watermark)

    @field_validator("reward", mode="before")
    @classmethod
    def _build_reward(cls, value: Any) -> Any:
        return value if callable(value) else _build("reward", value, Reward)


def _build(kind: str, value: Any, expected: type) -> Any:
    if value is None or isinstance(value, expected):
        return value
    if isinstance(value, str):
        return registry.create(kind, value)
    if isinstance(value, dict) and "name" in value:
        return registry.create(kind, value["name"], **{k: v for k, v in value.items() if k != "name"})
    raise ValueError(f"a {kind}, its registered name or {{'name': ..., settings}} is needed")


class AlignmentResampling(Configurable):
    """Best of n marked answers under a reward."""

    Config = AlignmentResamplingConfig
    config: AlignmentResamplingConfig
    name = "alignment-resampling"

    def setup(self) -> None:
        if self.config.selection == "reward" and self.config.reward is None:
            raise InputError("AlignmentResampling: reward is required (or selection='perplexity')")

    def generate(
        self, model: Any, tokenizer: Any, prompts: Sequence[Any], *, seed: int = 0, max_new_tokens: int = 64,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        batch_size: int | None = None, first_index: int = 0,
    ) -> DecodeResult:  # fmt: skip
        """The best candidate per prompt, all candidates with their rewards, and the cost.

        Arguments as `fairlead.generation.generate`. With n = 1 the result is plain marked generation, id for id.
        Raises InputError when the reward gives another number of values than candidates, or NaN.
        """
        began = time.monotonic()
        n = self.config.n
        candidates = generate(
            model, tokenizer, prompts, watermark=self.config.watermark, n=n, max_new_tokens=max_new_tokens, seed=seed,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, batch_size=batch_size,
            first_index=first_index, return_logprobs=self.config.selection == "perplexity",
        )  # fmt: skip
        flat = [g for group in candidates for g in group]
        if self.config.selection == "perplexity":
            scores = torch.tensor([_mean_logprob(g) for g in flat], dtype=torch.float64)
        else:
            scores = self._rewards(flat, tokenizer is None)
        scored = [replace(g, reward=float(s)) for g, s in zip(flat, scores.tolist(), strict=True)]
        groups = [scored[i : i + n] for i in range(0, len(scored), n)]
        chosen = [group[_first_best([float(g.reward or 0.0) for g in group])] for group in groups]
        tokens = sum(len(g.ids) for g in flat)
        return DecodeResult(
            generations=chosen, candidates=groups, kl=kl_price(n), kl_kind="bound",
            cost=Cost(tokens, 0 if self.config.selection == "perplexity" else len(flat), time.monotonic() - began),
        )  # fmt: skip

    def _rewards(self, flat: list[Generation], as_ids: bool) -> torch.Tensor:
        prompts = [_plain(g.prompt) for g in flat]
        responses: list[Any] = [g.ids if as_ids else g.text for g in flat]
        scores = torch.as_tensor(self.config.reward(prompts, responses), dtype=torch.float64).reshape(-1)
        if len(scores) != len(flat):
            raise InputError(f"reward: gave {len(scores)} values for {len(flat)} candidates; one per candidate is needed")
        if bool(scores.isnan().any()):
            raise InputError(f"reward: gave NaN for candidate {int(scores.isnan().nonzero()[0])}; a number is needed")
        return scores


def _first_best(scores: list[float]) -> int:
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def _mean_logprob(generation: Generation) -> float:
    if generation.logprobs is None or not len(generation.logprobs):
        return -math.inf
    return float(generation.logprobs.double().mean())


def _plain(prompt: Any) -> Any:
    """The last user message of a chat; rewards judge the question, not the template."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        return prompt[-1]["content"]
    return prompt
