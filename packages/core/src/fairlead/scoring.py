"""Rewards and log-probabilities of many responses of very different lengths, without paying for padding.

Sequences are packed into rows of a token budget (longest first, each into the row with the least room left), a prompt
with several responses is run once for all of them; models that cannot work on packed rows get length-sorted padded
batches. Either way results come back in input order. Attention over segments is `packed`'s, the head `logprobs`'.

Shape suffixes: S sequences, P prompts, C classes, D width.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .errors import InputError
from .logprobs import backbone, head_logprobs, hidden_states, linear_head, position_logprobs, unwrapped
from .packed import Segment, packed_attention, packed_hidden, why_not_packable

log = logging.getLogger("fairlead")
LEAST_SHARED = 4
"""Common tokens below which sharing a beginning costs more calls of attention than it saves."""
_own_pooling: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Scores:
    """One entry per response, in input order, on the CPU; groups are the prompts.

    reward_S: float32 [S], pooled reward (0 in mode "logprob"). sum_logp_S: float32 [S], log-probability of the response.
    n_tokens_S: int64 [S], tokens in that sum: with an empty prompt the first has no predictor and is left out.
    advantage_S: float32 [S]. winner_P: int64 [P], index of the best response within its group, lowest on ties, -1 where
    none can be scored. offsets: int64 [P + 1], where groups begin. valid_S: bool [S], False where a NaN was dropped.
    """

    reward_S: torch.Tensor
    sum_logp_S: torch.Tensor
    n_tokens_S: torch.Tensor
    advantage_S: torch.Tensor
    winner_P: torch.Tensor
    offsets: torch.Tensor
    valid_S: torch.Tensor


@dataclass
class _Batch:
    """One forward pass: ids [B, T] with where each sequence lies. Places are flat, row x T + column."""

    ids: torch.Tensor
    attention: torch.Tensor | None = None  # None: a packed row
    segments: list[Segment] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)  # places of all tokens of each member
    predictors: list[list[int]] = field(default_factory=list)  # places that predict its response


class RewardBatcher:
    """Scores responses with one model.

    model: a sequence classifier with a head named `score`, any causal LM (with `head`), in any mode of training.
    mode: "reward", "logprob" (of the response under a causal LM) or "both". head: weight [D] or [1, D] of the reward on
    the hidden states; default the model's own `score`. pooling: hidden state of the last token, or the mean over all.
    token_budget: tokens per forward pass, 8192 on a GPU and 1024 elsewhere; a longer sequence is an InputError unless
    allow_oversize. nan: "raise", "drop" (out of all statistics, advantage 0, never the winner) or "zero".
    advantage: kind of `group_normalize` ("grpo", "dr-grpo", "batch", "rloo", "quantile"), None for none. share_prompts: run each prompt
    once for its responses. pack: None packs where the model can, False never does.
    """

    def __init__(
        self, model: Any, *, mode: Literal["reward", "logprob", "both"] = "reward", head: torch.Tensor | None = None,
        pooling: Literal["last", "mean"] = "last", token_budget: int | None = None, allow_oversize: bool = False,
        nan: Literal["raise", "drop", "zero"] = "raise", advantage: str | None = "grpo", temperature: float = 1.0,
        share_prompts: bool = True, pack: bool | None = None,
    ) -> None:  # fmt: skip
        if mode not in ("reward", "logprob", "both"):
            raise InputError(f"mode: must be 'reward', 'logprob' or 'both', got {mode!r}")
        self.model, self.mode, self.pooling, self.nan = model, mode, pooling, nan
        self.device = unwrapped(model).device
        self.token_budget = token_budget or (8192 if self.device.type == "cuda" else 1024)
        self.allow_oversize, self.temperature, self.share_prompts = allow_oversize, temperature, share_prompts
        self.advantage = advantage
        self.packs = pack is not False and not why_not_packable(model)
        if pack and not self.packs:
            raise InputError(f"pack: this model cannot be packed ({why_not_packable(model)})")
        self.head = None if head is None else head.reshape(-1, head.shape[-1]).to(self.device)
        if mode != "logprob" and self.head is None and getattr(unwrapped(model), "score", None) is None:
            raise InputError(f"{type(model).__name__}: has no reward head named 'score'; pass head=weight of shape [1, D]")

    def score(self, prompts: Sequence[Any], responses: Sequence[Sequence[Any]]) -> Scores:
        """prompts: P token lists (or 1-D tensors); responses: P lists of one or more token lists.

        InputError: another number of groups than prompts, a group without members, an empty prompt and response,
        a sequence beyond the budget, a NaN reward (nan="raise").
        """
        if len(prompts) != len(responses):
            raise InputError(f"one list of responses per prompt is needed, got {len(prompts)} and {len(responses)}")
        groups = [[(_ids(p), _ids(r)) for r in group] for p, group in zip(prompts, responses, strict=True)]
        for index, group in enumerate(groups):
            if not group:
                raise InputError(f"prompt {index}: has no responses; a group needs one or more")
            if any(not p and not r for p, r in group):
                raise InputError(f"prompt {index}: prompt and response are both empty")
        count = sum(len(g) for g in groups)
        pooled, sums = torch.zeros(count), torch.zeros(count)
        lengths = torch.zeros(count, dtype=torch.int64)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for batch in self._batches(groups):
                    self._run(batch, pooled, sums, lengths)
        finally:
            self.model.train(training)
        return self._finish(pooled, sums, lengths, [len(g) for g in groups])

    def _batches(self, groups: list[list[tuple[list[int], list[int]]]]) -> Iterator[_Batch]:
        flat = [pair for group in groups for pair in group]
        for i, (p, r) in enumerate(flat):
            if len(p) + len(r) > self.token_budget and not self.allow_oversize:
                raise InputError(f"sequence {i}: has {len(p) + len(r)} tokens, token_budget is {self.token_budget}; raise it or allow_oversize")
        if not self.packs:
            yield from _padded(flat, self.token_budget)
            return
        units: list[tuple[int, list[int]]] = []  # (tokens, members that share one prompt)
        first = 0
        for group in groups:
            members = list(range(first, first + len(group)))
            first += len(group)
            units += _units(flat, members, self.token_budget) if self.share_prompts else [(sum(map(len, flat[m])), [m]) for m in members]
        from fairlead_kernels import best_fit

        for row in best_fit([tokens for tokens, _ in units], self.token_budget, allow_oversize=True):
            yield _packed_row(flat, [units[i][1] for i in row])

    def _run(self, batch: _Batch, pooled: torch.Tensor, sums: torch.Tensor, lengths: torch.Tensor) -> None:
        ids = batch.ids.to(self.device)
        predictors = [place for places in batch.predictors for place in places]
        linear = linear_head(self.model) if self.mode != "reward" else None
        hidden_MD = None
        if self.mode != "logprob" or linear is not None:
            if batch.attention is None:
                hidden_MD = packed_hidden(self.model, ids[0], batch.segments)
            else:
                hidden_MD = hidden_states(self.model, _padded_inputs(ids, batch.attention)).flatten(0, 1)
        if self.mode != "logprob":
            assert hidden_MD is not None
            pooled[batch.members] = self._pool(hidden_MD, batch)
        if self.mode == "reward" or not predictors:
            return
        targets = torch.tensor([t for m in batch.tokens for t in m], device=self.device)
        targets = ids.flatten()[_targets(batch, targets)]
        places = torch.tensor(predictors, device=self.device)
        if linear is not None and hidden_MD is not None:
            logp_N = head_logprobs(linear, hidden_MD[places], targets, self.temperature)
        elif batch.attention is not None:
            logp_N = position_logprobs(self.model, _padded_inputs(ids, batch.attention), places, targets, self.temperature)
        else:
            positions = torch.cat([torch.arange(s.prefix, s.prefix + s.end - s.start) for s in batch.segments])
            inputs = {"input_ids": ids, "position_ids": positions[None].to(self.device), "fairlead_segments": batch.segments}
            with packed_attention(self.model):
                logp_N = position_logprobs(self.model, inputs, places, targets, self.temperature)
        owner = torch.tensor([m for m, p in zip(batch.members, batch.predictors, strict=True) for _ in p])
        sums.index_add_(0, owner, logp_N.float().cpu())
        lengths.index_add_(0, owner, torch.ones_like(owner))

    def _pool(self, hidden_MD: torch.Tensor, batch: _Batch) -> torch.Tensor:
        if self.pooling == "last":
            state_SD = hidden_MD[torch.tensor([t[-1] for t in batch.tokens], device=self.device)].float()
        else:
            state_SD = torch.stack([hidden_MD[torch.tensor(t, device=self.device)].float().mean(0) for t in batch.tokens])
        return self._head(state_SD)[:, 0].cpu()

    def _head(self, state_SD: torch.Tensor) -> torch.Tensor:
        """float32 scores: 16-bit rewards tie too often."""
        if self.head is not None:
            return state_SD @ self.head.float().T
        return _apply_head(unwrapped(self.model).score, state_SD)

    def _finish(self, pooled: torch.Tensor, sums: torch.Tensor, lengths: torch.Tensor, sizes: list[int]) -> Scores:
        value = sums if self.mode == "logprob" else pooled
        bad = value.isnan()
        if bool(bad.any()) and self.nan == "raise":
            raise InputError(f"sequence {int(bad.nonzero()[0])}: its reward is NaN; nan='drop' or 'zero' goes on")
        if self.nan == "zero":
            value, bad = value.nan_to_num(0.0), torch.zeros_like(bad)
        offsets = torch.tensor([0, *sizes]).cumsum(0)
        winners, advantages = [], torch.zeros_like(value)
        if len(value) and self.advantage is not None:
            from fairlead_kernels import group_normalize

            advantages = group_normalize(value, offsets, kind=self.advantage, nan=self.nan).float()
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            scored = [(float(value[i]), start - i, i - start) for i in range(start, end) if not bad[i]]
            winners.append(max(scored)[2] if scored else -1)
        return Scores(
            reward_S=value if self.mode != "logprob" else torch.zeros_like(value), sum_logp_S=sums, n_tokens_S=lengths,
            advantage_S=advantages, winner_P=torch.tensor(winners, dtype=torch.int64), offsets=offsets, valid_S=~bad,
        )  # fmt: skip


def classifier_scores(
    model: Any, sequences: Sequence[Sequence[int]], token_budget: int | None = None, groups: Sequence[Any] | None = None
) -> torch.Tensor:
    """Logits float32 [S, C] of a Hugging Face sequence classifier, in input order, on the CPU.

    A decoder's head is applied to the last real token, whatever its id; packed where the model can. Others (encoders
    with their own pooling) run as they are on length-sorted padded batches. groups: one value per sequence, equal for
    answers to one prompt; what the sequences of a group begin with in common is run once where rows are packed.
    """
    from fairlead_kernels import best_fit

    device = unwrapped(model).device
    budget = token_budget or (8192 if device.type == "cuda" else 1024)
    pairs: list[tuple[list[int], list[int]]] = [([], _ids(s)) for s in sequences]
    if any(not s for _, s in pairs):
        raise InputError("a sequence to classify is empty; give at least one token")
    ours = _pools_last_token(model)
    packs = ours and not why_not_packable(model)
    found: list[Any] = [None] * len(pairs)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if packs:
                units = _shared_units(pairs, groups, budget)
                rows = best_fit([tokens for tokens, _ in units], budget, allow_oversize=True)
                batches: Iterator[_Batch] = (_packed_row(pairs, [units[i][1] for i in row]) for row in rows)
            else:
                batches = _padded(pairs, budget)
            for batch in batches:
                ids = batch.ids.to(device)
                if not ours:
                    assert batch.attention is not None
                    logits_SC = model(input_ids=ids, attention_mask=batch.attention.to(device)).logits.float()
                else:
                    if batch.attention is None:
                        hidden_MD = packed_hidden(model, ids[0], batch.segments)
                    else:
                        hidden_MD = hidden_states(model, _padded_inputs(ids, batch.attention)).flatten(0, 1)
                    last = torch.tensor([t[-1] for t in batch.tokens], device=device)
                    logits_SC = _apply_head(unwrapped(model).score, hidden_MD[last].float())
                for member, row_C in zip(batch.members, logits_SC.cpu(), strict=True):
                    found[member] = row_C
    finally:
        model.train(training)
    return torch.stack(found) if found else torch.zeros(0, int(unwrapped(model).config.num_labels))


def _ids(value: Any) -> list[int]:
    return value.reshape(-1).tolist() if isinstance(value, torch.Tensor) else [int(t) for t in value]


def _units(flat: list[tuple[list[int], list[int]]], members: list[int], budget: int) -> list[tuple[int, list[int]]]:
    """Responses to one prompt, cut into runs that fit the budget together with it."""
    prompt = len(flat[members[0]][0])
    if not prompt:
        return [(len(flat[m][1]), [m]) for m in members]
    units: list[tuple[int, list[int]]] = []
    for member in members:
        size = len(flat[member][1])
        if units and units[-1][0] + size <= budget:
            units[-1] = (units[-1][0] + size, [*units[-1][1], member])
        else:
            units.append((prompt + size, [member]))
    return units


def _shared_units(pairs: list[tuple[list[int], list[int]]], groups: Sequence[Any] | None, budget: int) -> list[tuple[int, list[int]]]:
    """Units of sequences ([], ids); those of a group are split in place into their common beginning and the rest."""
    members: dict[Any, list[int]] = {}
    for i in range(len(pairs)):
        members.setdefault(i if groups is None else groups[i], []).append(i)
    units: list[tuple[int, list[int]]] = []
    for group in members.values():
        first, last = min(pairs[i][1] for i in group), max(pairs[i][1] for i in group)
        shared = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        shared = min(shared, min(len(pairs[i][1]) for i in group) - 1)  # each keeps a last token of its own
        if len(group) > 1 and shared >= LEAST_SHARED:
            for i in group:
                ids = pairs[i][1]
                pairs[i] = (ids[:shared], ids[shared:])
        units += _units(pairs, group, budget)
    return units


def _packed_row(flat: list[tuple[list[int], list[int]]], units: list[list[int]]) -> _Batch:
    batch = _Batch(ids=torch.empty(0))
    ids: list[int] = []
    for members in units:
        start = len(ids)
        prompt = flat[members[0]][0]
        if len(members) == 1:
            ids += prompt + flat[members[0]][1]
            batch.segments.append(Segment(start, len(ids)))
            _place(batch, members[0], list(range(start, len(ids))), len(prompt))
            continue
        ids += prompt
        batch.segments.append(Segment(start, len(ids)))
        shared = list(range(start, len(ids)))
        for member in sorted(members, key=lambda m: len(flat[m][1])):
            begin = len(ids)
            ids += flat[member][1]
            if len(ids) > begin:
                batch.segments.append(Segment(begin, len(ids), start, start + len(prompt)))
            _place(batch, member, shared + list(range(begin, len(ids))), len(prompt))
    batch.ids = torch.tensor(ids, dtype=torch.int64)[None]
    return batch


def _place(batch: _Batch, member: int, tokens: list[int], prompt: int) -> None:
    batch.members.append(member)
    batch.tokens.append(tokens)
    batch.predictors.append(tokens[max(prompt - 1, 0) : -1])


def _targets(batch: _Batch, places: torch.Tensor) -> torch.Tensor:
    """Places of the tokens that the predictors predict: the last ones of each member."""
    chosen, start = [], 0
    for tokens, predictors in zip(batch.tokens, batch.predictors, strict=True):
        end = start + len(tokens)
        chosen += list(range(end - len(predictors), end))
        start = end
    return places[torch.tensor(chosen, device=places.device)]


def _padded(flat: list[tuple[list[int], list[int]]], budget: int) -> Iterator[_Batch]:
    """Length-sorted batches, padded on the right, of at most `budget` tokens with their padding."""
    order = sorted(range(len(flat)), key=lambda i: -sum(map(len, flat[i])))
    start = 0
    while start < len(order):
        width = sum(map(len, flat[order[start]]))
        members = order[start : start + max(1, budget // width)]
        start += len(members)
        batch = _Batch(ids=torch.zeros(len(members), width, dtype=torch.int64), attention=torch.zeros(len(members), width, dtype=torch.int64))
        assert batch.attention is not None
        for row, member in enumerate(members):
            prompt, response = flat[member]
            size = len(prompt) + len(response)
            batch.ids[row, :size] = torch.tensor(prompt + response)
            batch.attention[row, :size] = 1
            _place(batch, member, list(range(row * width, row * width + size)), len(prompt))
        yield batch


def _padded_inputs(ids: torch.Tensor, attention: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": attention.to(ids.device)}


def _apply_head(head: Any, state_SD: torch.Tensor) -> torch.Tensor:
    if isinstance(head, torch.nn.Linear):
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(state_SD, head.weight.float(), bias)
    scores: torch.Tensor = head(state_SD.to(next(head.parameters()).dtype)).float()
    return scores


@torch.no_grad()
def _pools_last_token(model: Any) -> bool:
    """Whether the classifier's logits are its `score` head on the hidden state of the last token. Tried once."""
    inner = unwrapped(model)
    if inner not in _own_pooling:
        _own_pooling[inner] = False
        if getattr(inner, "score", None) is not None and backbone(model) is not inner:
            pad = inner.config.get_text_config().pad_token_id
            ids = torch.tensor([[i for i in range(8) if i != pad][:4]], device=inner.device)
            training = model.training
            model.eval()
            try:
                expected = model(input_ids=ids).logits.float()
                mine = _apply_head(inner.score, hidden_states(model, {"input_ids": ids})[:, -1].float())
                close = expected.shape == mine.shape and torch.allclose(mine, expected, rtol=2e-2, atol=2e-2)
                _own_pooling[inner] = bool(close)
            except (AttributeError, TypeError, ValueError, RuntimeError):
                pass
            finally:
                model.train(training)
    return _own_pooling[inner]
