"""Token search: at every token, the k likeliest candidates are re-weighted by what finishing through them is worth.

  S(z) = log pi(z | s) + w Q(s, z),   z among the k most probable next tokens of the model (ties: lower id)

and the next token is argmax S, or a draw from softmax(S / T) over the candidates; with a beam of b the b best of all
b k extensions go on, by cumulative log-probability plus w Q. Transfer Q*, controlled decoding, ARGS, DeAL and GenARM are
choices of (proposal, value, weight, beam). The law of a draw is that of the KL-regularised step
max_q E_q Q - (1 / w) KL(q || pi) restricted to the candidates.

Shape suffixes: R rows of the search, K candidates of each, V vocabulary, P prompts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.decoding import Answer, Request
from fairlead.engine import PADDING, choose
from fairlead.errors import InputError
from fairlead.generation import DEFAULT_ROWS, Generation
from fairlead.kinds import Decoder
from fairlead.models import logits_width

from .values import State, Value


class TokenSearchConfig(MethodConfig):
    """What all presets share."""

    top_k: int | None = Field(10, ge=1, description="candidate tokens at each step; none: the whole vocabulary")
    mode: Literal["greedy", "sample"] = Field("greedy", description="take the best candidate, or draw by score")
    trace: bool = Field(False, description="keep candidates, values and choice of every step in the provenance")


@dataclass
class Written:
    """One answer under way: its tokens, their log-probs under the model, and what the search knows of it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    total: float = 0.0
    value: float = 0.0
    kl: float = 0.0
    finished: bool = False
    spent: bool = False
    trace: list[dict[str, Any]] = field(default_factory=list)


class TokenSearch(Decoder):
    """The search; a preset says what a candidate is worth (`value`) and how much that weighs (`weight`)."""

    config: TokenSearchConfig
    needs_reward = True
    beam = 1

    @abstractmethod
    def value(self, request: Request) -> Value:
        """The estimator of Q for one batch."""

    @property
    @abstractmethod
    def weight(self) -> float:
        """w; 0 makes it plain decoding."""

    def candidates(self, request: Request) -> int:
        """Candidates of each row."""
        width = logits_width(request.model)
        return width if self.config.top_k is None else min(self.config.top_k, width)

    @property
    def rows_per_prompt(self) -> int:
        return (self.config.top_k or DEFAULT_ROWS) * self.beam

    @property
    def plain(self) -> dict[str, Any]:
        if self.config.mode == "greedy":
            return {"temperature": 0.0}
        return {} if self.config.top_k is None else {"top_k": self.config.top_k}

    def prepare(self, model: Any, tokenizer: Any, reward: Any) -> Any:
        if (self.config.top_k or 1) > logits_width(model):
            raise InputError(f"top_k: {self.config.top_k} candidates are asked for, the model has {logits_width(model)} tokens")
        return super().prepare(model, tokenizer, reward)

    def decode(self, request: Request) -> list[Answer]:
        state = State(request, request.engine(), list(range(len(request.encoded))), [[] for _ in request.encoded])
        value = self.value(request)
        if self.weight:
            value.begin(state)
        live = [Written() for _ in state.places]
        pools: list[list[Written]] = [[] for _ in state.places]
        widths = [self.beam] * len(pools)
        while True:
            picked = self._step(state, value, live, widths)
            rows, tokens, grown, places = [], [], [], []
            for place, pool in enumerate(pools):
                kept = [(row, w) for row, w in picked if state.places[row] == place]
                widths[place] -= sum(w.finished for _, w in kept)
                pool += [w for _, w in kept if w.finished or w.spent or len(w.tokens) == request.max_new_tokens]
                going = [(row, w) for row, w in kept if not (w.finished or w.spent or len(w.tokens) == request.max_new_tokens)]
                if self._settled(pool, [w for _, w in going], value):
                    going = []
                for row, written in going:
                    rows.append(row)
                    tokens.append(written.tokens[-1])
                    grown.append(written)
                    places.append(place)
            if not rows:
                break
            rows_R, tokens_R = torch.tensor(rows, device=request.device), torch.tensor(tokens, device=request.device)
            if rows != list(range(state.engine.rows)):
                state.engine.select(rows_R)
            state.engine.advance(tokens_R)
            if self.weight:
                value.advance(rows_R, tokens_R)
            live = grown
            state = State(request, state.engine, places, [w.tokens for w in grown], state.length + 1)
        return [self._answer(request, place, pool) for place, pool in enumerate(pools)]

    def _step(self, state: State, value: Value, live: list[Written], widths: list[int]) -> list[tuple[int, Written]]:
        """(row that it extends, answer) of what goes on, best first within each prompt."""
        request = state.request
        positions_R = torch.full((len(live),), state.length, dtype=torch.int64, device=request.device)
        logits_RV = request.rules.logits(state.engine, positions_R).float()
        if self.beam > 1 and request.watermark is not None:
            logits_RV = request.watermark.processor(pad_token_id=PADDING)(state.engine.ids_BT, logits_RV.clone())
        logp_RV = logits_RV.log_softmax(-1)
        width = self.candidates(request)
        logp_RK, ids_RK = likeliest(logp_RV, width)
        real_RK = logp_RK > -math.inf
        pays_P, goes_P = self._affordable(state, value, width)
        asked = [r for r, place in enumerate(state.places) if bool(pays_P[place]) and self._undecided(logp_RK[r], value, request)]
        value_RK = torch.zeros(ids_RK.shape, dtype=torch.float64)
        if self.weight and asked:
            value_RK[asked] = value.estimate(state, asked, ids_RK[asked], real_RK[asked])
        value_RK = value_RK.to(request.device)
        score_RK = logp_RK.double() + self.weight * value_RK if self.weight else logp_RK.double()
        if self.beam > 1:
            return self._extend_beams(state, live, logp_RK, ids_RK, value_RK, goes_P, widths)
        guided_RV = torch.full_like(logp_RV, -math.inf).scatter_(1, ids_RK, score_RK.to(logp_RV.dtype))
        greedy = self.config.mode == "greedy"
        sampler = request.sampler(temperature=0.0, top_k=None, top_p=None, min_p=None) if greedy else request.sampler()
        seeds_R = request.seeds(1)[state.places]
        tokens_R = choose(sampler, guided_RV, state.engine.ids_BT, seeds_R, positions_R)
        temperature = 1.0 if greedy or request.temperature == 0 else request.temperature
        kept_R = (logits_RV / temperature).log_softmax(-1).gather(1, tokens_R[:, None])[:, 0].tolist()
        kl_R = [-lp for lp in kept_R] if greedy or request.temperature == 0 else _divergence(guided_RV, logits_RV, temperature)
        place_RK = ids_RK == tokens_R[:, None]
        chosen_R = (value_RK * place_RK).sum(1).tolist()
        ended_R = request.rules.ended(tokens_R).tolist()
        picked = []
        for r, written in enumerate(live):
            written.tokens.append(int(tokens_R[r]))
            written.logprobs.append(kept_R[r])
            written.total += kept_R[r]
            written.kl += kl_R[r]
            written.value, written.finished, written.spent = chosen_R[r], ended_R[r], not bool(goes_P[state.places[r]])
            if self.config.trace:
                real = real_RK[r]
                written.trace.append(
                    {"candidates": ids_RK[r][real].tolist(), "logp": logp_RK[r][real].tolist(), "values": value_RK[r][real].tolist(), "chosen": int(tokens_R[r])}
                )
            picked.append((r, written))
        return picked

    def _extend_beams(
        self, state: State, live: list[Written], logp_RK: torch.Tensor, ids_RK: torch.Tensor, value_RK: torch.Tensor,
        goes_P: torch.Tensor, widths: list[int],
    ) -> list[tuple[int, Written]]:  # fmt: skip
        """The best extensions of each prompt's rows; equal scores in order of beam, then of candidate."""
        picked: list[tuple[int, Written]] = []
        request = state.request
        logp, ids, values = logp_RK.double().tolist(), ids_RK.tolist(), value_RK.tolist()
        ended = request.rules.ended(ids_RK.flatten()).reshape(ids_RK.shape).tolist()
        for place in dict.fromkeys(state.places):
            rows = [r for r, p in enumerate(state.places) if p == place]
            every = [(live[r].total + logp[r][k] + self.weight * values[r][k], r, k) for r in rows for k in range(len(ids[r])) if logp[r][k] > -math.inf]
            for _, r, k in sorted(every, key=lambda item: -item[0])[: widths[place]]:
                token, lp, before = ids[r][k], logp[r][k], live[r]
                grown = Written([*before.tokens, token], [*before.logprobs, lp], before.total + lp, values[r][k], before.kl - lp)
                grown.finished, grown.spent = ended[r][k], not bool(goes_P[place])
                picked.append((r, grown))
        return picked

    def _affordable(self, state: State, value: Value, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [P] twice: which prompts can pay for a guided step, and which for another token after this one. One reward
        call is kept for the answer itself."""
        meter = state.request.meter
        tokens, calls = value.cost(width, state.left) if self.weight else (0, 0)
        rows_P = torch.bincount(torch.tensor(state.places), minlength=len(meter.calls_P))
        after = self.models_in_step * rows_P
        return meter.affords(rows_P * tokens + after, rows_P * calls + 1), meter.affords(after)

    @property
    def models_in_step(self) -> int:
        """Models that run every token of the answer."""
        return 1

    def _undecided(self, logp_K: torch.Tensor, value: Value, request: Request) -> bool:
        """Whether any value within the reward's bounds could change a greedy choice."""
        if self.config.mode != "greedy" or self.beam > 1 or value.bounds is None or request.watermark is not None or self.config.trace:
            return True
        if len(logp_K) == 1:
            return False
        low, high = value.bounds
        return float(logp_K[0] - logp_K[1]) <= self.weight * (high - low)

    def _settled(self, pool: list[Written], live: list[Written], value: Value) -> bool:
        """Whether as many finished answers as the beam is wide score at least as much as any live one ever could."""
        if self.beam == 1 or not live or len(pool) < self.beam or value.bounds is None:
            return False
        least = sorted((w.total + self.weight * w.value for w in pool), reverse=True)[self.beam - 1]
        return least >= max(w.total for w in live) + self.weight * value.bounds[1]

    def _answer(self, request: Request, place: int, pool: list[Written]) -> Answer:
        chosen = max(range(len(pool)), key=lambda i: (pool[i].total + self.weight * pool[i].value, -i)) if self.beam > 1 else 0
        candidates = [self._generation(request, place, written, judged=i == chosen) for i, written in enumerate(pool)]
        written = pool[chosen]
        extra: dict[str, Any] = self.told(request, place, candidates[chosen])
        if written.spent and not written.finished:
            extra["budget"] = "spent"
        if written.trace:
            extra["trace"] = written.trace
        greedy = self.config.mode == "greedy" or request.temperature == 0
        if request.watermark is not None and not greedy:
            return Answer(candidates, chosen, extra=extra)
        return Answer(candidates, chosen, written.kl, "exact" if greedy else "estimate", extra)

    def _generation(self, request: Request, place: int, written: Written, judged: bool) -> Generation:
        ids = torch.tensor(written.tokens)
        reward = None
        if judged and request.reward is not None and bool(request.meter.affords(0, 1)[place]):
            reward = float(request.reward([place], [ids], [written.finished])[0])
        return request.generation(
            place, ids, finished=written.finished, logprobs=torch.tensor(written.logprobs), reward=reward, score=written.total + self.weight * written.value
        )

    def told(self, request: Request, place: int, generation: Generation) -> dict[str, Any]:
        """Further provenance of the chosen answer."""
        return {}


def likeliest(logp_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probs of each row and their ids, largest first, ties in order of id."""
    if k >= logp_RV.shape[1]:
        logp_RK, ids_RK = logp_RV.sort(dim=1, descending=True, stable=True)
        return logp_RK[:, :k], ids_RK[:, :k]
    logp_RK, ids_RK = logp_RV.topk(k, dim=1)
    ties = (logp_RV >= logp_RK[:, -1:]).sum(1) > k
    if bool(ties.any()):
        tied = ties.nonzero()[:, 0]
        ids_RK[tied] = logp_RV[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    ids_RK = ids_RK.sort(dim=1).values
    logp_RK, order = logp_RV.gather(1, ids_RK).sort(dim=1, descending=True, stable=True)
    return logp_RK, ids_RK.gather(1, order)


def _divergence(guided_RV: torch.Tensor, logits_RV: torch.Tensor, temperature: float) -> list[float]:
    """KL of the guided draw from the model's own at this temperature, nats, row by row."""
    logq = (guided_RV.double() / temperature).log_softmax(-1)
    logp = (logits_RV.double() / temperature).log_softmax(-1)
    found: list[float] = torch.where(logq > -math.inf, logq.exp() * (logq - logp), 0.0).sum(1).tolist()
    return found
