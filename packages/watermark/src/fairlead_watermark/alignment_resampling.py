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
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request, best, draw
from fairlead.errors import InputError
from fairlead.generation import Generation
from fairlead.kinds import Decoder, Guard, Reward, Watermark
from fairlead.kinds.reward import as_reward, question

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

    @property
    def rows_per_prompt(self) -> int:
        return self.config.n

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        return as_reward(self.config.reward) if reward is None and self.config.reward is not None else reward

    def decode(self, request: Request) -> list[Answer]:
        """The best candidate per prompt, all candidates with their rewards. With n = 1 it is plain marked generation, id
        for id. A watermark given to `generate` takes the place of the configured one."""
        if request.watermark is None:
            request.watermark = self.config.watermark
        by_likelihood = self.config.selection == "perplexity"
        groups = draw(request, self.config.n, logprobs=by_likelihood)
        if by_likelihood:
            groups = [[replace(g, reward=_mean_logprob(g)) for g in group] for group in groups]
        chosen = [best(group) for group in groups]
        if self.config.selection == "categorical":
            chosen = self._categorical(request, groups, chosen)
        return [Answer(group, choice, kl_price(len(group)), "bound") for group, choice in zip(groups, chosen, strict=True)]

    def _categorical(self, request: Request, groups: list[list[Generation]], winners: list[int]) -> list[int]:
        """Per prompt a uniform choice among candidates with a preferred label; the winner by reward where there is none.
        The draw depends on the seed and the prompt's index alone."""
        chosen = []
        for place, (group, winner) in enumerate(zip(groups, winners, strict=True)):
            verdicts = self.config.guard([question(g.prompt) for g in group], [g.text for g in group])
            request.meter.calls_P[place] += len(group)
            good = [j for j, verdict in enumerate(verdicts) if verdict.label in self.config.preferred]
            draw_of = random.Random(f"{request.seed} {request.indices[place]}")
            chosen.append(draw_of.choice(good) if good else winner)
        return chosen


def _mean_logprob(generation: Generation) -> float:
    if generation.logprobs is None or not len(generation.logprobs):
        return -math.inf
    return float(generation.logprobs.double().mean())
