"""What every decoder is handed: one batch of prompts ready to be answered, a budget that is kept, rewards that are checked.

A decoder (`kinds.Decoder`) reads a `Request` and gives `Answer`s; it neither encodes prompts, nor counts, nor catches.

Shape suffixes: P prompts of the batch, N texts to score, B rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .engine import RolloutEngine, Rules, roll
from .errors import FairleadError, InputError
from .generation import Generation, PlainSampler, seeds
from .kinds.reward import question

if TYPE_CHECKING:
    from .kinds.watermark import TokenSampler, Watermark


@dataclass(frozen=True)
class Budget:
    """What one prompt may cost: tokens through a model (its own tokens included, any model counts), reward calls,
    seconds of wall clock (of a batch: times its prompts). None: no limit. InputError unless every limit is above 0."""

    model_tokens: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("model_tokens", "reward_calls", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"budget: {name} must be above 0, got {value}; leave it out for no limit")

    @classmethod
    def of(cls, value: Any) -> Budget:
        """A Budget from a Budget, a mapping of its fields, a number of model tokens, or None."""
        if value is None or isinstance(value, Budget):
            return value or cls()
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(model_tokens=value)
        if isinstance(value, dict) and set(value) <= {"model_tokens", "reward_calls", "seconds"}:
            return cls(**value)
        raise InputError(f"budget: a Budget, or some of model_tokens, reward_calls, seconds is needed, got {value!r}")


class Meter:
    """What the prompts of one batch have cost, and what they can still afford."""

    def __init__(self, budget: Budget, prompts: int) -> None:
        self.budget = budget
        self.began = time.monotonic()
        self.calls_P = torch.zeros(prompts, dtype=torch.int64)
        self._engines: list[RolloutEngine] = []

    def watch(self, engine: RolloutEngine) -> None:
        """Count what goes through this engine (and its forks)."""
        self._engines.append(engine)

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return self.budget.seconds is not None and self.seconds >= self.budget.seconds * len(self.calls_P)

    @property
    def tokens_P(self) -> torch.Tensor:
        """Tokens int64 [P] through all models, padding and ended rows not counted."""
        total = torch.zeros_like(self.calls_P)
        for engine in self._engines:
            total += engine.tokens_P
        return total

    @property
    def model_tokens(self) -> int:
        return sum(engine.model_tokens for engine in self._engines)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def affords(self, tokens: int | torch.Tensor, calls: int | torch.Tensor = 0) -> torch.Tensor:
        """bool [P]: which prompts can pay for so many more tokens and reward calls."""
        fine = torch.ones_like(self.calls_P, dtype=torch.bool)
        if self.budget.model_tokens is not None:
            fine &= self.tokens_P + tokens <= self.budget.model_tokens
        if self.budget.reward_calls is not None:
            fine &= self.calls_P + calls <= self.budget.reward_calls
        return fine & False if self.late else fine


class Scorer:
    """The rewards of one batch: asked once per distinct text, counted to its prompt, checked."""

    def __init__(self, reward: Any, request: Request) -> None:
        if request.tokenizer is None and not reward.accepts_ids:
            raise InputError(f"reward: {type(reward).__name__} reads text, but there is no tokenizer; give one")
        self.reward, self._request = reward, request
        self.bounds = reward.bounds
        self._known: dict[tuple[Any, ...], float] = {}
        self._prompts = [request.asked(place) for place in range(len(request.encoded))]

    def __call__(self, places: Sequence[int], answers: Sequence[torch.Tensor], finished: Sequence[bool]) -> torch.Tensor:
        """Rewards float64 [N] of N answers (id tensors) to the prompts at these places of the batch.

        InputError names the prompt whose reward is not finite, raises, or of which there are too few."""
        texts = self._request.texts(answers)
        keys = [(p, _key(t), f) for p, t, f in zip(places, texts, finished, strict=True)]
        new: dict[tuple[Any, ...], int] = {}
        for i, key in enumerate(keys):
            if key not in self._known:
                new.setdefault(key, i)
        if new:
            rows = list(new.values())
            values = self._ask([places[i] for i in rows], [texts[i] for i in rows], [finished[i] for i in rows])
            self._known.update(zip(new, values, strict=True))
            for i in rows:
                self._request.meter.calls_P[places[i]] += 1
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float64)

    def _ask(self, places: list[int], texts: list[Any], finished: list[bool]) -> list[float]:
        try:
            values = torch.as_tensor(self.reward([self._prompts[p] for p in places], texts, finished)).double().reshape(-1).cpu()
        except Exception as error:
            raise InputError(f"prompt {self._culprit(places, texts, finished)}: its reward cannot be had: {_said(error)}") from error
        if len(values) != len(texts):
            raise InputError(f"reward: gave {len(values)} values for {len(texts)} responses; one for each is needed")
        bad = (~values.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            where = self._request.indices[places[bad[0]]]
            raise InputError(f"prompt {where}: its reward is {float(values[bad[0]])}; a finite number is needed")
        return values.tolist()

    def _culprit(self, places: list[int], texts: list[Any], finished: list[bool]) -> int:
        """Index of the first prompt whose text alone makes the reward fail."""
        for place, text, end in zip(places, texts, finished, strict=True):
            try:
                self.reward([self._prompts[place]], [text], [end])
            except Exception:
                return self._request.indices[place]
        return self._request.indices[places[0]]


def _key(text: Any) -> Any:
    return tuple(text.tolist()) if isinstance(text, torch.Tensor) else text


def _said(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, FairleadError) and words else f"{type(error).__name__}: {words}"


@dataclass
class Request:
    """A batch of prompts that a decoder is to answer.

    prompts: as given. encoded: their ids, int64 [T] each. indices: their numbers in the whole, which set the noise.
    reward: None where the caller gave none. The sampling settings are those of `generate`.
    """

    model: Any
    tokenizer: Any
    prompts: list[Any]
    encoded: list[torch.Tensor]
    indices: list[int]
    rules: Rules
    meter: Meter
    seed: int = 0
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    watermark: Watermark | None = None
    given_reward: Any = None
    reward: Scorer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.given_reward is not None:
            self.reward = Scorer(self.given_reward, self)

    @property
    def truncates(self) -> bool:
        """Whether sampling leaves the model's own distribution at its temperature."""
        return self.top_k is not None or self.top_p not in (None, 1.0) or bool(self.min_p)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def engine(self, model: Any = None, *, prompts: Sequence[torch.Tensor] | None = None, rollback: bool = False) -> RolloutEngine:
        """The prompts (or these, one for each) run through the model (or another) once, counted. InputError for a prompt
        that costs more than its budget."""
        texts = self.encoded if prompts is None else list(prompts)
        lengths = torch.tensor([len(text) for text in texts])
        short = (~self.meter.affords(lengths)).nonzero()[:, 0].tolist()
        if short and not self.meter.late:
            raise InputError(
                f"prompt {self.indices[short[0]]}: its {int(lengths[short[0]])} tokens exceed what is left of the budget of "
                f"{self.meter.budget.model_tokens} model tokens; raise it"
            )
        engine = RolloutEngine(self.model if model is None else model, rollback=rollback)
        engine.prefill(texts, self.max_new_tokens)
        self.meter.watch(engine)
        return engine

    def sampler(self, **changed: Any) -> TokenSampler:
        """What draws a token: the watermark's sampler or the plain one, with the request's settings."""
        names = ("temperature", "top_k", "top_p", "min_p")
        options: dict[str, Any] = {name: getattr(self, name) for name in names} | changed
        return PlainSampler(**options) if self.watermark is None else self.watermark.sampler(**options)

    def seeds(self, n: int, stream: int = 0) -> torch.Tensor:
        """One seed per prompt and candidate, int64 [P x n]; candidate j of a prompt has one seed whatever n is. Streams
        other than 0 share nothing with what `generate` draws."""
        return seeds(self.seed if not stream else self.seed ^ (0x5EED_0000 + stream) << 32, self.indices, n).to(self.device)

    def asked(self, place: int) -> Any:
        """What a reward sees of a prompt: its text (the last message of a chat), its ids without a tokenizer."""
        prompt = self.prompts[place]
        if self.tokenizer is None:
            return self.encoded[place]
        if isinstance(prompt, torch.Tensor):
            return self.tokenizer.decode(self.encoded[place], skip_special_tokens=True)
        return question(prompt)

    def texts(self, answers: Sequence[torch.Tensor]) -> list[Any]:
        """What a reward sees of answers: their text without special tokens, their ids without a tokenizer."""
        if self.tokenizer is None:
            return list(answers)
        return [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]

    def generation(
        self, place: int, ids: torch.Tensor, *, finished: bool, logprobs: torch.Tensor | None = None, reward: float | None = None,
        **provenance: Any,
    ) -> Generation:  # fmt: skip
        """One answer to the prompt at this place of the batch."""
        prompt = self.prompts[place]
        marked = {} if self.watermark is None else {"watermark": self.watermark.name}
        return Generation(
            prompt=None if isinstance(prompt, torch.Tensor) else prompt, text="" if self.tokenizer is None else self.texts([ids])[0],
            ids=ids, logprobs=logprobs, finished=finished, reward=reward,
            provenance={"seed": self.seed, "index": self.indices[place], "candidate": 0, **marked, **provenance},
        )  # fmt: skip


@dataclass
class Answer:
    """What a decoder found for one prompt.

    candidates: what it looked at, `chosen` one of them by index. kl, kl_kind: divergence in nats of this prompt's answer
    from the model's own sampling, or None. extra: figures of the method, merged into the chosen one's provenance.
    """

    candidates: list[Generation]
    chosen: int = 0
    kl: float | None = None
    kl_kind: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def draw(
    request: Request, n: int, *, logprobs: bool = True, engine: RolloutEngine | None = None, places: Sequence[int] | None = None,
    first: int = 0,
) -> list[list[Generation]]:  # fmt: skip
    """n independent answers to each prompt (fewer where the budget does not reach), with their rewards where there is a
    reward; candidate j is `generate`'s candidate j, whatever n is.

    logprobs: keep the log-probs of the chosen tokens under the model, at the sampling temperature (1 for greedy).
    engine: the prompts' engine, which is forked and left as it is; default a new one. places: draw for these prompts of
    the batch alone, one list of answers for each. first: number of the first candidate.
    """
    wanted = list(range(len(request.encoded))) if places is None else list(places)
    counts, room = _affordable(request, n, wanted)
    owner = [place for place, count in zip(wanted, counts, strict=True) for _ in range(count)]
    number = [j for count in counts for j in range(count)]
    if engine is not None:
        engine = engine.fork(1, torch.tensor(owner, device=request.device))
    else:
        engine = request.engine()
        if min(counts) == n and len(wanted) == len(request.encoded):
            engine.expand(n)
        else:
            engine.select(torch.tensor(owner, device=request.device))
    seeds_B = request.seeds(first + n)[[place * (first + n) + first + j for place, j in zip(owner, number, strict=True)]]
    made = roll(
        engine, room, request.sampler(), request.rules, seeds_B=seeds_B, stop=lambda: request.meter.late,
        temperature=(request.temperature or 1.0) if logprobs else None,
    )  # fmt: skip
    scores: list[float] | list[None] = [None] * len(owner)
    if request.reward is not None:
        scores = request.reward(owner, made.ids, made.ended).tolist()
    groups: dict[int, list[Generation]] = {place: [] for place in wanted}
    for row, (place, j) in enumerate(zip(owner, number, strict=True)):
        more = {"logprobs": made.logprobs[row]} if logprobs else {}
        answer = request.generation(
            place, made.ids[row], finished=made.ended[row], reward=scores[row], candidate=first + j, **more
        )
        groups[place].append(answer)
    return list(groups.values())


def _affordable(request: Request, n: int, places: Sequence[int]) -> tuple[list[int], int]:
    """Answers that each of these prompts can pay for (at least one) if all are as long as they may be, and that length."""
    budget, room, meter = request.meter.budget, request.max_new_tokens, request.meter
    counts = [n] * len(places)
    if budget.reward_calls is not None and request.reward is not None:
        counts = [max(1, min(n, budget.reward_calls - int(meter.calls_P[p]))) for p in places]
    if budget.model_tokens is None:
        return counts, room
    spent_P = meter.tokens_P
    left = [budget.model_tokens - (int(spent_P[p]) or len(request.encoded[p])) for p in places]
    room = min(room, max(0, min(left)) + 1)  # the last token of an answer is not run
    return [max(1, min(c, rest // max(1, room - 1))) for c, rest in zip(counts, left, strict=True)], room


def best(group: Sequence[Generation]) -> int:
    """Index of the candidate with the highest reward, the lowest on ties; 0 where there are none."""
    return max(range(len(group)), key=lambda j: (group[j].reward if group[j].reward is not None else 0.0, -j))
