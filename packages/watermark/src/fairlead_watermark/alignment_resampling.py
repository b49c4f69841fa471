"""Alignment resampling: draw n marked answers, return the one that the reward likes best.

Verma, Phan, Trivedi, "Watermarking Degrades Alignment in Language Models" (arXiv 2506.04462): y_1..y_n iid from the
marked model with one key and fresh sampling noise, y = y_argmax r(x, y_i), ties to the lowest index. The returned answer
is tested like any other. The n candidates are one batched generation whose prompt is computed once; their rewards are
one batched call. Under Gaussian rewards the gain is at least C sqrt(ln n), see `bounds.resampling_gain`.
Plain Gumbel is deterministic given key and prompt: its candidates are equal and nothing is gained.
Categorical selection, the paper's other rule, picks uniformly among the candidates that a guard gives a preferred label;
where none has one we fall back to the reward, then to the first candidate.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.generation import Cost, DecodeResult, Generation, generate
from fairlead.kinds import Decoder, Guard, Reward, Watermark

from .bounds import kl_price


class AlignmentResamplingConfig(MethodConfig):
    """watermark, reward, guard: objects, or {"name": ..., settings} for the registry; watermark None resamples unmarked
    text."""

    watermark: Any = Field(None, description="a Watermark, or its registered name and settings; none: unmarked")
    reward: Any = Field(None, description="a Reward or callable(prompts, responses), or its registered name and settings")
    n: int = Field(4, ge=1, description="candidates per prompt")
    selection: Literal["reward", "categorical", "perplexity"] = Field(
        "reward",
        description="reward: the best; categorical: any with a preferred label; perplexity: the likeliest, the control",
    )
    guard: Any = Field(
        None, description="what labels answers for categorical selection: a Guard, or its registered name and settings"
    )
    preferred: tuple[str, ...] = Field((), description="labels that categorical selection accepts")

    @field_validator("watermark", mode="before")
    @classmethod
    def _build_watermark(cls, value: Any) -> Any:
        return _build("watermark", value, Watermark)

    @field_validator("reward", mode="before")
    @classmethod
    def _build_reward(cls, value: Any) -> Any:
        return value if callable(value) else _build("reward", value, Reward)

    @field_validator("guard", mode="before")
    @classmethod
    def _build_guard(cls, value: Any) -> Any:
        return _build("guard", value, Guard)

    @field_validator("preferred", mode="before")
    @classmethod
    def _one_label(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def _build(kind: str, value: Any, expected: type) -> Any:
    if value is None or isinstance(value, expected):
        return value
    if isinstance(value, str):
        return registry.create(kind, value)
    if isinstance(value, dict) and "name" in value:
        return registry.create(kind, value["name"], **{k: v for k, v in value.items() if k != "name"})
    raise ValueError(f"a {kind}, its registered name or {{'name': ..., settings}} is needed")


class AlignmentResampling(Decoder):
    """Best of n marked answers under a reward."""

    Config = AlignmentResamplingConfig
    config: AlignmentResamplingConfig
    name = "alignment-resampling"

    def setup(self) -> None:
        if self.config.selection == "reward" and self.config.reward is None:
            raise InputError("AlignmentResampling: reward is required (or selection='perplexity')")
        if self.config.selection == "categorical" and (self.config.guard is None or not self.config.preferred):
            raise InputError("AlignmentResampling: categorical selection needs a guard and the preferred labels")

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
        calls = len(flat) * ((self.config.selection == "categorical") + (self.config.reward is not None))
        if self.config.selection == "perplexity":
            scores, calls = [_mean_logprob(g) for g in flat], 0
        elif self.config.reward is None:
            scores = [0.0] * len(flat)
        else:
            scores = self._rewards(flat, tokenizer is None).tolist()
        winners = [_first_best(scores[i : i + n]) for i in range(0, len(flat), n)]
        if self.config.selection == "categorical":
            winners = self._categorical(flat, winners, seed, first_index)
        if self.config.reward is not None or self.config.selection == "perplexity":
            flat = [replace(g, reward=s) for g, s in zip(flat, scores, strict=True)]
        groups = [flat[i : i + n] for i in range(0, len(flat), n)]
        return DecodeResult(
            generations=[group[winner] for group, winner in zip(groups, winners, strict=True)], candidates=groups,
            kl=kl_price(n), kl_kind="bound",
            cost=Cost(sum(len(g.ids) for g in flat), calls, time.monotonic() - began),
        )  # fmt: skip

    def _categorical(self, flat: list[Generation], winners: list[int], seed: int, first_index: int) -> list[int]:
        """Per prompt a uniform choice among candidates with a preferred label; the winner by reward where there is none.
        The draw depends on the seed and the prompt's index alone."""
        verdicts = self.config.guard([question(g.prompt) for g in flat], [g.text for g in flat])
        fits = [verdict.label in self.config.preferred for verdict in verdicts]
        n = self.config.n
        chosen = []
        for place, winner in enumerate(winners):
            good = [j for j in range(n) if fits[place * n + j]]
            chosen.append(random.Random(f"{seed} {first_index + place}").choice(good) if good else winner)
        return chosen

    def _rewards(self, flat: list[Generation], as_ids: bool) -> torch.Tensor:
        prompts = [question(g.prompt) for g in flat]
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


def question(prompt: Any) -> Any:
    """The last user message of a chat; rewards judge the question, not the template."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        return prompt[-1]["content"]
    return prompt
