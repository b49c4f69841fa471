"""A causal language model as a judge: its next-token law after a question about the response.

yes-no: log sum p(yes tokens) - log sum p(no tokens), or the sigmoid of that. expected-score: sum_k k p(k) over score tokens,
p normalised among them (as G-Eval weighs scores by their probabilities, Liu et al., arXiv 2303.16634). Nothing is sampled,
so the reward is deterministic and continuous. Leaves batching and the head to `scoring`.

Shape suffixes: N pairs, M distinct questions, V tokens of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from ..config import MethodConfig
from ..errors import InputError
from ..kinds.reward import Reward, check_pairs, question
from .loading import causal, chat_ids, check_model, name_of, plain_ids, room

_PAIR = "A user wrote:\n{prompt}\n\nThe assistant answered:\n{response}\n\n"
TEMPLATES = {
    "yes-no": _PAIR + "Is this a good answer? Reply with Yes or No only.\nReply:",
    "expected-score": _PAIR + "How good is this answer, from 1 (bad) to 5 (excellent)? Reply with one number only.\nReply:",
}
_FIELD = re.compile(r"\{(prompt|response)\}")


class JudgeConfig(MethodConfig):
    """Settings of the judge."""

    model: Any = Field(description="folder, hub id or zoo:NAME of a causal language model, or a loaded (model, tokenizer) pair")
    mode: Literal["yes-no", "expected-score"] = Field(
        "yes-no", description="yes against no, or the mean score, weighted by a softmax over the score tokens alone"
    )
    value: Literal["log-odds", "probability"] = Field("log-odds", description="what yes-no gives: log-odds of yes, or their sigmoid")
    template: str | None = Field(
        None, description="question with {prompt} and {response}, put through the chat template where there is one; default by mode"
    )
    yes: list[str] = Field(["yes"], min_length=1, description="words for yes; with capitals and a leading space too, summed")
    no: list[str] = Field(["no"], min_length=1, description="words for no, likewise")
    scores: list[int] = Field([1, 2, 3, 4, 5], min_length=2, description="scores of expected-score; each must be one token")
    max_length: int = Field(4096, ge=8, description="longest question in tokens; longer ones lose their start")
    token_budget: int = Field(1024, ge=16, description="tokens per micro-batch")

    @field_validator("model")
    @classmethod
    def _is_model(cls, value: Any) -> Any:
        return check_model(value)

    @field_validator("template")
    @classmethod
    def _asks_about_the_response(cls, value: str | None) -> str | None:
        if value is not None and "{response}" not in value:
            raise ValueError("must hold {response}, and {prompt} where the judge is to see the prompt")
        return value

    @model_validator(mode="after")
    def _distinct(self) -> JudgeConfig:
        both = {w.lower().strip() for w in self.yes} & {w.lower().strip() for w in self.no}
        if both:
            raise ValueError(f"yes and no: must have no word in common, both hold {sorted(both)[0]!r}")
        if len(set(self.scores)) < len(self.scores):
            raise ValueError(f"scores: each must be there once, got {self.scores}")
        return self


class JudgeReward(Reward):
    """Log-odds (or probability) of yes, or the expected score, by the judge's next token. Text within a prompt or response
    can argue with the judge: treat the reward of text from untrusted hands accordingly."""

    Config = JudgeConfig
    config: JudgeConfig

    def setup(self) -> None:
        scored, chance = self.config.mode == "expected-score", self.config.value == "probability"
        if scored:
            self.bounds = (float(min(self.config.scores)), float(max(self.config.scores)))
        elif chance:
            self.bounds = (0.0, 1.0)
        self._ready: tuple[Any, Any, list[list[int]]] | None = None

    def _judge(self) -> tuple[Any, Any, list[list[int]]]:
        """(model, tokenizer, token ids of each answer: yes and no, or the scores)."""
        if self._ready is None:
            model, tokenizer = causal(self.config.model)
            if self.config.mode == "expected-score":
                groups = [[str(score)] for score in self.config.scores]
            else:
                groups = [self.config.yes, self.config.no]
            tokens = [answer_tokens(tokenizer, words) for words in groups]
            flat = [t for group in tokens for t in group]
            if len(set(flat)) < len(flat):
                shared = next(t for t in flat if flat.count(t) > 1)
                raise InputError(f"judge {name_of(self.config.model)}: two answers share the token {tokenizer.decode([shared])!r}")
            self._ready = model, tokenizer, tokens
        return self._ready

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        if not len(responses):
            return torch.zeros(0)
        model, tokenizer, answers = self._judge()
        longest = room(model, self.config.max_length + 1) - 1  # the answer needs a place
        asked = [self._ids(tokenizer, str(question(p)), str(r), longest) for p, r in zip(prompts, responses, strict=True)]
        # Equal questions are asked once: their rewards must not differ by a rounding.
        distinct = {ids: place for place, ids in enumerate(dict.fromkeys(asked))}
        logp_MV = next_token_logprobs(model, list(distinct), [t for group in answers for t in group], self.config.token_budget)
        groups = logp_MV.double().split([len(group) for group in answers], 1)
        logp_MA = torch.stack([group.logsumexp(1) for group in groups], 1)
        return self._value(logp_MA)[[distinct[ids] for ids in asked]].float()

    def _value(self, logp_MA: torch.Tensor) -> torch.Tensor:
        """Rewards [M] from the log-probability of each answer."""
        if self.config.mode == "expected-score":
            return logp_MA.softmax(1) @ torch.tensor(self.config.scores, dtype=logp_MA.dtype)
        log_odds_M = logp_MA[:, 0] - logp_MA[:, 1]
        return log_odds_M.sigmoid() if self.config.value == "probability" else log_odds_M

    def _ids(self, tokenizer: Any, prompt: str, response: str, longest: int) -> tuple[int, ...]:
        given = {"prompt": prompt, "response": response}
        text = _FIELD.sub(lambda found: given[found[1]], self.config.template or TEMPLATES[self.config.mode])
        if tokenizer.chat_template:
            ids = chat_ids(tokenizer, [{"role": "user", "content": text}])
        else:
            ids = plain_ids(tokenizer, text)
        return tuple(ids[-longest:])


def answer_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Ids of the single tokens that spell one of the words: as it is, in lower and upper case, capitalised, each with and
    without a leading space. InputError for a word none of whose spellings is one token."""
    found: list[int] = []
    for word in words:
        plain = word.strip()
        spellings = dict.fromkeys(s + w for w in (plain, plain.lower(), plain.capitalize(), plain.upper()) for s in ("", " "))
        ids = [t for spelling in spellings if plain for t in _single(tokenizer, spelling)]
        if not ids:
            raise InputError(f"judge: {word!r} is not one token of this tokenizer; choose answers that are")
        found += ids
    return list(dict.fromkeys(found))


def _single(tokenizer: Any, spelling: str) -> list[int]:
    """The token that is this spelling: what it encodes to, or (SentencePiece puts a space before) its entry in the vocabulary."""
    encoded = tokenizer.encode(spelling, add_special_tokens=False)
    entry = tokenizer.convert_tokens_to_ids(spelling)
    ids = [*(encoded if len(encoded) == 1 else []), *([entry] if isinstance(entry, int) else [])]
    return [t for t in ids if t != tokenizer.unk_token_id]


def next_token_logprobs(model: Any, sequences: Sequence[Sequence[int]], tokens: Sequence[int], token_budget: int) -> torch.Tensor:
    """log p(token | sequence) float32 [M, V] of V tokens after each of M sequences. Each sequence is run once, and the
    tokens are its one-token responses, where the model can work on packed rows."""
    from ..scoring import RewardBatcher

    budget = max(token_budget, max(map(len, sequences)) + len(tokens))
    batcher = RewardBatcher(model, mode="logprob", token_budget=budget, advantage=None, nan="drop")
    scores = batcher.score(list(sequences), [[[t] for t in tokens]] * len(sequences))
    if not bool(scores.valid_S.all()):
        raise InputError("judge: the model's logits are NaN")
    return scores.sum_logp_S.reshape(len(sequences), len(tokens))
