"""A learned value: a linear map of a causal language model's last hidden state, at the last token of prompt and response.

V(x, y) = w . h(x, y) + b, fitted by ridge regression on scored responses (closed form; the penalty by held-out error). It
reads any prefix, so it can guide a search token by token (the value functions of controlled decoding, Mudgal et al.,
arXiv 2310.17022, with a frozen trunk). Leaves packing and prompts shared by several responses to `scoring`.

Shape suffixes: N pairs, M distinct pairs, D hidden width, L penalties.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, field_validator

from ..config import MethodConfig
from ..errors import InputError
from ..files import atomic_write
from ..kinds.reward import Reward, check_pairs, question
from ..models import resolve
from ..scoring import RewardBatcher
from .loading import Template, causal, chat_ids, check_model, name_of, plain_ids, room

log = logging.getLogger("fairlead")
Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class ValueHead:
    """weight float32 [1, D], bias float32 [1]. model: name of the model it was fitted on. template: how pairs became ids.
    info: what is known of the fit (penalty, held-out R2, pairs)."""

    weight: torch.Tensor
    bias: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    model: str = ""
    template: Template = "auto"
    info: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[0] != 1 or self.bias.shape != (1,):
            raise InputError(f"value head: needs weight [1, D] and bias [1], got {list(self.weight.shape)} and {list(self.bias.shape)}")
        if not bool(self.weight.isfinite().all() & self.bias.isfinite().all()):
            raise InputError("value head: its weight or bias is not finite")

    def save(self, path: str | os.PathLike[str]) -> None:
        """A safetensors file, whole or not there."""
        from safetensors.torch import save

        tensors = {"weight": self.weight.float().cpu().contiguous(), "bias": self.bias.float().cpu().contiguous()}
        metadata = {"format": "pt", "model": self.model, "template": self.template, "info": json.dumps(self.info)}
        with atomic_write(path, "wb") as stream:
            stream.write(save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ValueHead:
        """From a safetensors file with weight [1, D] and, if it likes, bias [1] and metadata; InputError for any other."""
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                if "weight" not in file.keys():  # noqa: SIM118 - no mapping
                    raise ValueError("it holds no tensor named weight")
                weight = file.get_tensor("weight").float()
                bias = file.get_tensor("bias").float() if "bias" in file.keys() else torch.zeros(1)  # noqa: SIM118
            template: Template = metadata.get("template", "auto")  # type: ignore[assignment]
            if template not in ("auto", "chat", "concatenate"):
                raise ValueError(f"its template {template!r} is not known")
            return cls(weight, bias, metadata.get("model", ""), template, json.loads(metadata.get("info", "{}")))
        except (OSError, ValueError, SafetensorError) as error:
            cause = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("value head: ")
            raise InputError(f"value head {name!r}: cannot be read: {cause}") from None


class ValueHeadConfig(MethodConfig):
    """Settings of the value head."""

    head: Any = Field(description="ValueHead, or a safetensors file with weight [1, D] and optional bias [1]")
    model: Any = Field(
        None, description="folder, hub id or zoo:NAME of the causal language model, or a loaded (model, tokenizer) pair; default the head's"
    )
    template: Template | None = Field(
        None, description="chat, concatenate (the response right after the prompt) or auto (chat where there is a template); default the head's"
    )
    max_length: int = Field(4096, ge=2, description="longest pair in tokens; longer ones lose the start of the prompt")
    token_budget: int = Field(1024, ge=16, description="tokens per micro-batch")

    @field_validator("head")
    @classmethod
    def _is_head(cls, value: Any) -> Any:
        if isinstance(value, (ValueHead, os.PathLike)) or (isinstance(value, str) and value):
            return value
        raise ValueError("must be a ValueHead or the path of a safetensors file")

    @field_validator("model")
    @classmethod
    def _is_model(cls, value: Any) -> Any:
        return value if value is None else check_model(value)


class ValueHeadReward(Reward):
    """w . h + b at the last token of the pair, finished or not. Pairs may be id tensors, which are taken as they are."""

    Config = ValueHeadConfig
    config: ValueHeadConfig
    granularity = "prefix"
    accepts_ids = True

    def setup(self) -> None:
        head = self.config.head
        self.head = head if isinstance(head, ValueHead) else ValueHead.load(head)
        self._source = self.head.model if self.config.model is None else self.config.model
        if not self._source:
            raise InputError("value-head: model is required, for the head does not name its own")
        self._ready: tuple[Any, Any] | None = None

    def _model(self) -> tuple[Any, Any]:
        if self._ready is None:
            model, tokenizer = causal(self._source)
            width, name = _width(model), name_of(self._source)
            if width != self.head.weight.shape[1]:
                raise InputError(f"value head: has width {self.head.weight.shape[1]}, the hidden states of {name} have {width}")
            pair = not isinstance(self._source, (str, os.PathLike))
            known = {"", name} if pair else {"", name, resolve(name)}
            if self.head.model not in known and not (pair and ":" in self.head.model):  # a pair does not know its zoo: name
                log.warning("value head: was fitted on %s, and is used on %s", self.head.model, name)
            self._ready = model, tokenizer
        return self._ready

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        check_pairs(prompts, responses)
        if not len(responses):
            return torch.zeros(0)
        model, tokenizer = self._model()
        longest = room(model, self.config.max_length)
        pairs = _encoded(tokenizer, prompts, responses, self.config.template or self.head.template, longest)
        asked, answers, places_N = _grouped(pairs)
        budget = _budget(pairs, self.config.token_budget)
        batcher = RewardBatcher(model, head=self.head.weight, token_budget=budget, advantage=None, nan="drop")
        scores = batcher.score(asked, answers)
        if not bool(scores.valid_S.all()):
            raise InputError(f"value head: the hidden states of {name_of(self._source)} are NaN")
        return (scores.reward_S + self.head.bias.cpu())[places_N]


def fit_value_head(
    model: Any, tokenizer: Any, prompts: Sequence[Any], responses: Sequence[Any], targets: Any, *, penalty: float | None = None,
    held_out: float = 0.2, seed: int = 0, template: Template = "auto", max_length: int = 4096, token_budget: int = 1024,
    name: str | None = None,
) -> ValueHead:  # fmt: skip
    """The head w, b that minimises sum (w . h + b - target)^2 / N + penalty |w|^2, in float64.

    prompts, responses: N texts or id tensors each. targets: N rewards, for instance of the whole response that a prefix
    belongs to. penalty: None takes the best on a held-out share (of the prompts where there are five, else of the pairs)
    among ten powers of ten around the mean variance of a hidden unit, then fits on everything; info["held_out_r2"] is that
    share's R2. name: what the head calls its model, default where that was loaded from. InputError: other lengths, fewer than 4 pairs, a target that is not finite.
    """
    check_pairs(prompts, responses)
    target_N = torch.as_tensor(targets, dtype=torch.float64).detach().cpu().reshape(-1)
    if len(target_N) != len(responses) or len(target_N) < 4:
        raise InputError(f"targets: one for each of 4 or more pairs is needed, got {len(target_N)} for {len(responses)} pairs")
    if not bool(target_N.isfinite().all()):
        raise InputError(f"targets: number {int((~target_N.isfinite()).nonzero()[0])} is not finite")
    if not 0 < held_out < 1 or (penalty is not None and not 0 <= penalty < math.inf):
        raise InputError(f"held_out must lie in (0, 1) and penalty be at least 0, got {held_out} and {penalty}")
    pairs = _encoded(tokenizer, prompts, responses, template, room(model, max_length))
    state_ND = last_states(model, pairs, token_budget).double()
    if not bool(state_ND.isfinite().all()):
        raise InputError("value head: the model's hidden states are not finite")
    info = {"pairs": float(len(pairs))}
    if penalty is None:
        test_N = _held_out(pairs, held_out, seed)
        train_ND, train_N = state_ND[~test_N], target_N[~test_N]
        scale = float(train_ND.var(0, correction=0).mean()) or 1.0
        grid = [scale * 10.0**k for k in range(-7, 3)]
        weight_LD, bias_L = ridge(train_ND, train_N, grid)
        error_L = (state_ND[test_N] @ weight_LD.T + bias_L - target_N[test_N, None]).square().mean(0)
        best = int(error_L.argmin())
        spread = float((target_N[test_N] - train_N.mean()).square().mean())
        penalty = grid[best]
        info["held_out_r2"] = 1.0 - float(error_L[best]) / spread if spread else 0.0
    weight_LD, bias_L = ridge(state_ND, target_N, [penalty])
    called = str(getattr(model.config, "_name_or_path", "")) if name is None else name
    return ValueHead(weight_LD.float(), bias_L.float(), called, template, {**info, "penalty": penalty})


def ridge(state_ND: torch.Tensor, target_N: torch.Tensor, penalties: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin_w,b sum (w . h + b - t)^2 / N + penalty |w|^2 for each penalty: weights [L, D], biases [L], float64.

    By the eigenvectors of the smaller of the two Gram matrices, [D, D] or [N, N], once for all penalties.
    """
    mean_D, mean = state_ND.mean(0), target_N.mean()
    x_ND, y_N, count = state_ND - mean_D, target_N - mean, len(target_N)
    small = x_ND.shape[1] <= count
    value, vector = torch.linalg.eigh((x_ND.T @ x_ND if small else x_ND @ x_ND.T) / count)
    projected = vector.T @ ((x_ND.T @ y_N if small else y_N) / count)
    # A direction without variance takes no part, penalty or not.
    alive = value > value.max().clamp(min=0) * 1e-12
    weights = []
    for penalty in penalties:
        solved = vector @ torch.where(alive, projected / (value + penalty).clamp(min=torch.finfo(value.dtype).tiny), 0.0)
        weights.append(solved if small else x_ND.T @ solved)
    weight_LD = torch.stack(weights)
    return weight_LD, mean - weight_LD @ mean_D


def last_states(model: Any, pairs: Sequence[Pair], token_budget: int = 1024) -> torch.Tensor:
    """Final hidden state float32 [N, D], as the language model's head sees it, at the last token of each pair of ids."""
    prompts, responses, places_N = _grouped(pairs)
    batcher = _States(model, head=torch.zeros(1, _width(model)), token_budget=_budget(pairs, token_budget), advantage=None)
    batcher.kept = {}
    batcher.score(prompts, responses)
    return torch.stack([batcher.kept[place] for place in places_N])


class _States(RewardBatcher):
    """The batcher, keeping the hidden state of each sequence's last token in place of its score."""

    kept: dict[int, torch.Tensor]

    def _pool(self, hidden_MD: torch.Tensor, batch: Any) -> torch.Tensor:
        last = torch.tensor([tokens[-1] for tokens in batch.tokens], device=hidden_MD.device)
        self.kept.update(zip(batch.members, hidden_MD[last].float().cpu(), strict=True))
        return torch.zeros(len(batch.members))


def _grouped(pairs: Sequence[Pair]) -> tuple[list[Any], list[list[Any]], list[int]]:
    """(prompts, the responses to each, where each pair stands among all of these): equal pairs once, for their values must
    not differ by a rounding, and a prompt once for all its responses."""
    groups: dict[Any, list[Any]] = {}
    for prompt, response in dict.fromkeys(pairs):
        groups.setdefault(prompt, []).append(response)
    flat = [(prompt, response) for prompt, group in groups.items() for response in group]
    place = {pair: i for i, pair in enumerate(flat)}
    return list(groups), list(groups.values()), [place[pair] for pair in pairs]


def _budget(pairs: Sequence[Pair], token_budget: int) -> int:
    return max(token_budget, max(len(prompt) + len(response) for prompt, response in pairs))


def _encoded(tokenizer: Any, prompts: Sequence[Any], responses: Sequence[Any], template: Template, longest: int) -> list[Pair]:
    """(prompt ids, response ids) of each pair, cut at the start of the prompt. Tokenized apart, so that a response's ids do
    not change as it grows."""
    return [_pair(tokenizer, p, r, template, longest) for p, r in zip(prompts, responses, strict=True)]


def _pair(tokenizer: Any, prompt: Any, response: Any, template: Template, longest: int) -> Pair:
    if isinstance(prompt, torch.Tensor):
        asked = prompt.reshape(-1).tolist()
    elif template == "chat" or (template == "auto" and tokenizer.chat_template):
        asked = chat_ids(tokenizer, [{"role": "user", "content": str(question(prompt))}])
    else:
        asked = plain_ids(tokenizer, str(question(prompt)))
    if isinstance(response, torch.Tensor):
        answer = response.reshape(-1).tolist()
    else:
        answer = plain_ids(tokenizer, str(response), special=False)
    if not asked and not answer:  # a state needs a token
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError("value head: prompt and response are both empty, and the tokenizer has no token to begin with")
        asked = [start]
    answer = answer[-longest:]
    return tuple(asked[max(0, len(asked) + len(answer) - longest) :]), tuple(answer)


def _held_out(pairs: Sequence[Pair], share: float, seed: int) -> torch.Tensor:
    """bool [N]: pairs kept for choosing the penalty; whole prompts where there are five or more."""
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(p for p, _ in pairs))}
    unit_N = torch.tensor([prompts[p] for p, _ in pairs] if len(prompts) >= 5 else range(len(pairs)))
    units = int(unit_N.max()) + 1
    kept = torch.randperm(units, generator=torch.Generator().manual_seed(seed))[: min(units - 2, max(1, round(share * units)))]
    return torch.isin(unit_N, kept)


def _width(model: Any) -> int:
    """Width of the hidden states that the language model's head sees."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return int(model.config.get_text_config().hidden_size if weight is None else weight.shape[1])
