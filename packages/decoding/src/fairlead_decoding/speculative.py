"""Speculative sampling: a small draft model proposes gamma tokens, one call of the target accepts a part of them.

With q the target's next-token law and p the draft's, both after the same temperature and truncation, a proposal x is kept
with probability min(1, q(x) / p(x)); at the first refusal the next token is drawn from (q - p)_+ / sum, and from q where all
are kept. Answers have the target's law exactly; a call gives tau tokens on average, 1 to gamma + 1. Training a draft
for a high tau is the subject of arXiv 2403.00858; the sampling rule is that of arXiv 2211.17192 and 2302.01318.
Deviation: rows of a batch keep different numbers of tokens, where common implementations take one prompt at a time.

The rule and the blocks are in `speculation.py`; here are the settings, what is refused, and what is told.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator

from fairlead import models
from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request
from fairlead.engine import RolloutEngine
from fairlead.errors import InputError
from fairlead.generation import check_lengths
from fairlead.kinds import Decoder

from .speculation import Law, Speculation, Written

log = logging.getLogger("fairlead")
_alone: set[str] = set()


def block_efficiency(acceptance: float, gamma: int) -> float:
    """Tokens a target call where each of gamma proposals is accepted independently: (1 - a^(gamma + 1)) / (1 - a)."""
    return float(sum(acceptance**i for i in range(gamma + 1)))


def memory_bound_speedup(tau: float, parameter_ratio: float, gamma: int) -> float:
    """tau / (c gamma + 1): the gain in speed where a model call costs its parameters, whatever tokens it reads."""
    return tau / (parameter_ratio * gamma + 1)


class SpeculativeConfig(MethodConfig):
    """Settings of speculative sampling."""

    draft: Any = Field(description="the draft: a causal LM, its folder or hub id, or zoo:NAME; the target's tokenizer is its own")
    gamma: int = Field(4, ge=1, description="tokens that the draft proposes for each call of the target")

    @field_validator("draft", mode="before")
    @classmethod
    def _is_a_model(cls, value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)) or (hasattr(value, "forward") and hasattr(value, "config")):
            return value
        raise ValueError("a causal language model, or the name of one, is needed")


class Speculative(Decoder):
    """The target's own answers, in fewer calls of it.

    What is preserved: the law of `generate` with the same settings (not its noise), and at temperature 0 its tokens.
    Logits processors, `min_new_tokens` and the watermark change target and draft alike before the test, so the law is that
    of the marked target; for a mark that leaves no chance (keyed Gumbel) the tokens are `generate`'s. Rewards are not asked.
    Noise belongs to (seed, prompt, position in the answer), each position and purpose with its own.
    Where target and draft differ in width, the surplus must be padding of the head, and is never drawn.
    """

    Config = SpeculativeConfig
    config: SpeculativeConfig

    def setup(self) -> None:
        self._draft: Any = None
        self._draft_tokenizer: Any = None

    @property
    def plain(self) -> dict[str, Any]:
        return {"temperature": 0.0}

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        if self._draft is None:
            self._draft = self.config.draft
            if isinstance(self._draft, (str, os.PathLike)):
                self._draft, self._draft_tokenizer = models.load(self._draft, device=model.device, dtype=model.dtype)
        draft = self._draft
        if draft.device != model.device:
            raise InputError(f"draft: is on {draft.device}, the target on {model.device}; put them on one device")
        if draft.training:
            raise InputError("draft: is in training mode; call draft.eval()")
        _check_vocabularies(model, draft, tokenizer, self._draft_tokenizer)
        return reward

    def decode(self, request: Request) -> list[Answer]:
        for index, ids in zip(request.indices, request.encoded, strict=True):
            check_lengths(self._draft, [ids], request.max_new_tokens, index)
        _check_budget(request)
        draft = request.engine(self._draft, rollback=True)
        law = Law(request, models.logits_width(request.model), models.logits_width(self._draft))
        everyone = torch.arange(len(request.encoded), device=request.device)
        gamma = self.config.gamma
        if len(everyone) == 1 and request.meter.budget.model_tokens is None:
            # The prompt and the first proposals are one call. With a budget the prompt comes first, to see what is left.
            target = RolloutEngine(request.model, rollback=True)
            written = [Speculation(request, law, target, draft, everyone, gamma, request.encoded[0]).run()]
            return self._answers(request, written)
        target = request.engine(rollback=True)
        if len(everyone) == 1 or (target.takes_holes and draft.takes_holes):
            return self._answers(request, [Speculation(request, law, target, draft, everyone, gamma).run()])
        _say_alone(request.model if not target.takes_holes else self._draft)
        parts = [Speculation(request, law, target.fork(1, here), draft.fork(1, here), here, gamma).run() for here in everyone.split(1)]
        return self._answers(request, parts)

    def _answers(self, request: Request, written: list[list[Written]]) -> list[Answer]:
        ratio = _parameters(self._draft) / max(1, _parameters(request.model))
        kl = 0.0 if request.watermark is None else None  # how far the marked target is from the unmarked one is not known
        answers = []
        for place, (ids, ended, extra) in enumerate(row for part in written for row in part):
            made = request.generation(place, ids, finished=ended)
            answers.append(Answer([made], kl=kl, kl_kind="" if kl is None else "exact", extra={**extra, "parameter_ratio": ratio}))
        return answers

    def figures(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """target_calls; block_efficiency: tokens a call; block_efficiency_low_variance: 1 + sum_i prod_(j <= i)
        min(1, q_j / p_j) along all that was drafted, averaged over calls; acceptance_by_position: share of calls whose
        first i drafted tokens were accepted; mean_acceptance: share of the tested tokens; parameter_ratio c;
        memory_bound_speedup tau / (c gamma + 1)."""
        calls = sum(a.extra["target_calls"] for a in answers)
        if not calls:
            return {}
        drafted, accepted = (torch.tensor([a.extra[f"{what}_by_position"] for a in answers]).sum(0) for what in ("drafted", "accepted"))
        tested = sum(a.extra["tested"] for a in answers)
        tau = sum(len(a.candidates[0].ids) for a in answers) / calls
        ratio = answers[0].extra["parameter_ratio"]
        return {
            "target_calls": calls,
            "block_efficiency": tau,
            "block_efficiency_low_variance": sum(a.extra["expected_tokens"] for a in answers) / calls,
            "acceptance_by_position": [int(a) / int(d) if d else None for a, d in zip(accepted, drafted, strict=True)],
            "mean_acceptance": int(accepted.sum()) / tested if tested else None,
            "parameter_ratio": ratio,
            "memory_bound_speedup": memory_bound_speedup(tau, ratio, self.config.gamma),
        }


def _check_vocabularies(model: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any) -> None:
    """InputError unless both models speak of the same tokens; a head may have rows that no token has."""
    mine, theirs = models.logits_width(model), models.logits_width(draft)
    padded = hasattr(tokenizer, "__len__") and len(tokenizer) <= min(mine, theirs)
    if mine != theirs and not padded:
        raise InputError(
            f"draft: {_name(draft)} has a vocabulary of {theirs}, the target {_name(model)} one of {mine}; both need the same "
            "tokenizer" + ("" if tokenizer is not None else " (give it, where only the padding of the heads differs)")
        )
    if draft_tokenizer is not None and hasattr(tokenizer, "get_vocab") and draft_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"draft: the tokenizer of {_name(draft)} has other tokens than that of the target {_name(model)}; both need the same")


def _check_budget(request: Request) -> None:
    """InputError for a prompt that the budget does not carry through both models."""
    budget = request.meter.budget.model_tokens
    for index, ids in zip(request.indices, request.encoded, strict=True):
        if budget is not None and 2 * len(ids) > budget:
            raise InputError(
                f"prompt {index}: its {len(ids)} tokens, through target and draft, exceed the budget of {budget} model tokens; "
                "raise the budget"
            )


def _name(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _say_alone(model: Any) -> None:
    name = type(model).__name__
    if name not in _alone:
        _alone.add(name)
        log.warning("%s: its cache takes no holes, so speculative decoding answers one prompt at a time", name)
