"""What a candidate token is worth: the value estimators of token search.

Q(s, z) = E r(x, y) over how the answer goes on after token z. Estimated by
  Rollouts   n continuations of at most h tokens by some model (greedy for n = 1), scored by a reward; h = 0 scores the
             bare prefix. Averaged by an estimator: with reward r, baseline reward b and temperature beta,
               mean   sum_i r_i / n
               self   sum_i w_i r_i, w = softmax((r - b) / beta)          self-normalised importance weights
               paper  sum_i exp((r_i - b_i) / beta) r_i / n               as published, its constant dropped
               soft   beta ln( sum_i exp((r_i - b_i) / beta) / n )        the exact marginal of the tilted model
  Implicit   log-ratio of two models at the next token, of one alone where there is no reference.
A finished candidate is its own only continuation.

Shape suffixes: R rows of the search, K candidates of each, N continuations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fairlead.decoding import Request, Scorer
from fairlead.engine import RolloutEngine, roll
from fairlead.generation import PlainSampler

Estimator = Literal["mean", "self", "paper", "soft"]
_NOISE = 1 << 20  # positions of a rollout's noise, per token of the answer


@dataclass
class State:
    """The live rows of a search, all of one length: the prompt of each, its tokens so far, the proposal's engine."""

    request: Request
    engine: RolloutEngine
    places: list[int]
    answers: list[list[int]]
    length: int = 0
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.request.max_new_tokens - self.length

    def ranks(self) -> list[int]:
        """Number of each row among those of its prompt."""
        seen: dict[int, int] = {}
        found = []
        for place in self.places:
            found.append(seen.get(place, 0))
            seen[place] = found[-1] + 1
        return found


class Value(ABC):
    """An estimator of Q. `begin` sets up its own models; `advance` keeps them in step with the search."""

    bounds: tuple[float, float] | None = None

    def begin(self, state: State) -> None:  # noqa: B027 - most have no models of their own
        """Called once, before the first token."""

    @abstractmethod
    def estimate(self, state: State, rows: list[int], ids_RK: torch.Tensor, real_RK: torch.Tensor) -> torch.Tensor:
        """float64 [len(rows), K], 0 where a candidate is not real; ids and real have one line per row asked for."""

    def advance(self, rows: torch.Tensor, tokens_R: torch.Tensor) -> None:  # noqa: B027
        """The rows that go on, by their former numbers, and the token that each of them got."""

    def cost(self, width: int, left: int) -> tuple[int, int]:
        """Most tokens and reward calls that one step may take for one row of `width` candidates, `left` tokens to go."""
        return 0, 0


class Rollouts(Value):
    """Rewards of n continuations of at most `horizon` tokens."""

    def __init__(
        self, horizon: int, n: int = 1, *, model: Any = None, temperature: float = 0.0, estimator: Estimator = "mean",
        baseline: Any = None, beta: float = 1.0, width: int = 1,
    ) -> None:  # fmt: skip
        """model: what continues; None, the model of the search. baseline: the reward b. width: rows of one prompt at most."""
        self.horizon, self.n, self.model, self.temperature = horizon, n, model, temperature
        self.estimator, self.baseline, self.beta, self.width = estimator, baseline, beta, width
        self._engine: RolloutEngine | None = None
        self._baseline: Scorer | None = None

    def begin(self, state: State) -> None:
        request = state.request
        if self.model is not None and self.horizon > 0:
            self._engine = request.engine(self.model)
        if self.baseline is not None:
            self._baseline = Scorer(self.baseline, request)
        assert request.reward is not None
        self.bounds = request.reward.bounds if self.estimator in ("mean", "self") else None

    def cost(self, width: int, left: int) -> tuple[int, int]:
        return width * self.n * min(self.horizon, left - 1), width * self.n * (2 if self.baseline is not None else 1)

    def advance(self, rows: torch.Tensor, tokens_R: torch.Tensor) -> None:
        if self._engine is not None:
            self._engine.select(rows)
            self._engine.advance(tokens_R)

    def estimate(self, state: State, rows: list[int], ids_RK: torch.Tensor, real_RK: torch.Tensor) -> torch.Tensor:
        request = state.request
        lines, columns = (part.tolist() for part in real_RK.nonzero(as_tuple=True))
        tokens = ids_RK[real_RK].cpu()
        ended = request.rules.ended(tokens).tolist()
        room = min(self.horizon, state.left - 1)
        texts: list[list[torch.Tensor]] = []
        whole: list[list[bool]] = []
        for line, token, end in zip(lines, tokens.tolist(), ended, strict=True):
            texts.append([torch.tensor([*state.answers[rows[line]], token])])
            whole.append([end])
        open_pairs = [i for i, end in enumerate(ended) if not end] if room > 0 else []
        if open_pairs:
            self._continue(state, rows, lines, columns, tokens, open_pairs, room, ids_RK.shape[1], texts, whole)
        places = [state.places[rows[line]] for line, group in zip(lines, texts, strict=True) for _ in group]
        flat, finished = [t for group in texts for t in group], [f for group in whole for f in group]
        assert request.reward is not None
        rewards_N = request.reward(places, flat, finished)
        baseline_N = torch.zeros_like(rewards_N) if self._baseline is None else self._baseline(places, flat, finished)
        value_RK = torch.zeros(real_RK.shape, dtype=torch.float64)
        start = 0
        for line, column, group in zip(lines, columns, texts, strict=True):
            stop = start + len(group)
            value_RK[line, column] = combine(rewards_N[start:stop], baseline_N[start:stop], self.estimator, self.beta)
            start = stop
        return value_RK

    def _continue(
        self, state: State, rows: list[int], lines: list[int], columns: list[int], tokens: torch.Tensor, pairs: list[int],
        room: int, width: int, texts: list[list[torch.Tensor]], whole: list[list[bool]],
    ) -> None:  # fmt: skip
        """Replace the bare candidates by their continuations, all in one batch."""
        request, ranks = state.request, state.ranks()
        engine = state.engine if self._engine is None else self._engine
        owner = [rows[lines[i]] for i in pairs for _ in range(self.n)]
        twin = engine.fork(1, torch.tensor(owner, device=request.device))
        twin.advance(tokens[pairs].repeat_interleave(self.n).to(request.device))
        per_prompt = self.width * width * self.n
        noise = [
            (state.places[rows[lines[i]]] * self.width + ranks[rows[lines[i]]]) * width * self.n + columns[i] * self.n + j
            for i in pairs for j in range(self.n)
        ]  # fmt: skip
        seeds_B = request.seeds(per_prompt, stream=1)[noise] if self.temperature else torch.zeros(len(owner), dtype=torch.int64)
        made = roll(
            twin, room, PlainSampler(self.temperature), request.rules, seeds_B=seeds_B.to(request.device),
            first=state.length + 1, noise_from=(state.length + 1) * _NOISE,
        )  # fmt: skip
        for number, i in enumerate(pairs):
            mine = range(number * self.n, (number + 1) * self.n)
            prefix = texts[i][0]
            texts[i] = [torch.cat([prefix, made.ids[k]]) for k in mine]
            whole[i] = [made.ended[k] for k in mine]


def combine(rewards: torch.Tensor, baseline: torch.Tensor, estimator: Estimator, beta: float) -> float:
    """One value from the rewards float64 [N] and baseline rewards of N equally likely continuations."""
    if estimator == "mean":
        return float(rewards.mean())
    ratio = (rewards - baseline) / beta
    if estimator == "self":
        return float((ratio.softmax(0) * rewards).sum())
    if estimator == "paper":
        return float((ratio.exp() * rewards).mean())
    return beta * float(ratio.logsumexp(0) - torch.tensor(float(len(ratio))).log())


class Implicit(Value):
    """log pi_r(z | s) - log pi_ref(z | s) of two causal LMs (of the first alone without a reference): a reward model in the
    form of a language model, which needs no continuation."""

    def __init__(self, model: Any, reference: Any = None) -> None:
        self.models = [model] if reference is None else [model, reference]
        self._engines: list[RolloutEngine] = []

    def begin(self, state: State) -> None:
        self._engines = [state.request.engine(model) for model in self.models]

    def advance(self, rows: torch.Tensor, tokens_R: torch.Tensor) -> None:
        for engine in self._engines:
            engine.select(rows)
            engine.advance(tokens_R)

    def estimate(self, state: State, rows: list[int], ids_RK: torch.Tensor, real_RK: torch.Tensor) -> torch.Tensor:
        found = [e.logits_BV[rows].float().log_softmax(-1).gather(1, ids_RK).double().cpu() for e in self._engines]
        value_RK = found[0] if len(found) == 1 else found[0] - found[1]
        return torch.where(real_RK.cpu(), value_RK, 0.0)
