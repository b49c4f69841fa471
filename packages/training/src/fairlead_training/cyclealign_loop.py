"""CycleAlign's loop (arXiv 2310.16271): a model learns from the orders on which it and a black-box ranker agree.

Each iteration: the model writes n responses to every prompt, the black box ranks them, the model ranks them by its own
likelihood, and the longest order that both share becomes a demonstration for the black box and a row to train on. Left to
others: rankers (`rankers`), the shared order (`agreement`), losses (rrhf, pro, dpo-list), the optimiser (PreferenceTrainer).
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import random
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import Field, model_validator

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.errors import InputError

from .objectives.cyclealign import agreement
from .rankers import Demonstration, Ranker, as_ranking, rank_all

log = logging.getLogger("fairlead")
Row = dict[str, Any]
Sample = Callable[[Sequence[str], int], Sequence[Sequence[str]]]
Score = Callable[[str, Sequence[str]], Sequence[float]]
Train = Callable[[list[Row]], "Mapping[str, float] | None"]


class CycleAlignLoopConfig(MethodConfig):
    """Settings of the loop; the losses' own (margin, sft_weight, beta) go into loss_settings."""

    n: int = Field(4, ge=2, le=26, description="responses per prompt and iteration")
    loss: Literal["rrhf", "pro", "dpo-list"] = Field("rrhf", description="ranking loss that the rows are trained with")
    loss_settings: dict[str, Any] = Field({}, description="settings of the loss")
    target: Literal["agreement", "black_box"] = Field(
        "agreement", description="what a row holds: the responses both rank alike, or all of them in the black box's order"
    )
    least: int = Field(2, ge=2, description="m, length of the shared order from which on it is used")
    iterations: int = Field(5, ge=1, description="iterations T")
    prompts_per_iteration: int | None = Field(None, ge=1, description="prompts of one iteration; all by default")
    max_interactions: int = Field(5, ge=1, description="iterations after which a prompt is left alone")
    stop_when_agreed: bool = Field(True, description="leave a prompt alone once both ranked all its responses alike")
    max_parse_retries: int = Field(2, ge=0, description="further questions after an answer that is no order; then the prompt is skipped")
    capacity: int = Field(16, ge=0, description="dynamic demonstrations kept, the oldest go first")
    dynamic: int = Field(2, ge=0, description="dynamic demonstrations shown per question")
    near_duplicate: float = Field(
        0.9, gt=0, le=1, description="share of common words (Jaccard) from which on two prompts count as the same"
    )
    threads: int = Field(1, ge=1, description="questions to the ranker at a time")
    seed: int = Field(0, description="draws the demonstrations")

    @model_validator(mode="after")
    def _moves(self) -> CycleAlignLoopConfig:
        sft, margin = (float(self.loss_settings.get(name, default)) for name, default in (("sft_weight", 1.0), ("margin", 0.0)))
        if self.loss == "rrhf" and self.target == "agreement" and sft == 0 and margin == 0:
            raise ValueError(
                "rrhf on the agreement with sft_weight 0 and margin 0 never moves: the model has that order already, so every hinge is "
                "zero; set sft_weight or margin above 0, or target='black_box'"
            )
        return self


@dataclass(frozen=True)
class Interaction:
    """What became of one prompt in one iteration.

    responses: the distinct ones. black_box, white_box, agreed: rankings of them, best first; black_box is None where no answer could be
    read, and all three are empty where fewer than two responses were left. accepted: the agreed order is a demonstration and a row.
    """

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...] = ()
    black_box: tuple[int, ...] | None = ()
    white_box: tuple[int, ...] = ()
    agreed: tuple[int, ...] = ()
    accepted: bool = False

    @property
    def complete(self) -> bool:
        """Whether both rank all responses alike."""
        return len(self.responses) > 1 and len(self.agreed) == len(self.responses)


@dataclass(frozen=True)
class Iteration:
    """Interactions, rows ({"prompt", "completions", "ranks"}, best first) and metrics of one iteration."""

    interactions: list[Interaction]
    rows: list[Row]
    metrics: dict[str, float] = field(default_factory=dict)


class DemonstrationPool:
    """The last `capacity` demonstrations; never gives one whose prompt is the prompt asked about, or nearly so."""

    def __init__(self, capacity: int, near_duplicate: float = 0.9) -> None:
        self.near_duplicate = near_duplicate
        self._held: deque[tuple[frozenset[str], Demonstration]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._held)

    def push(self, demonstration: Demonstration) -> None:
        """Add one; the oldest goes when the pool is full."""
        self._held.append((_words(demonstration.prompt), demonstration))

    def others(self, prompt: str) -> list[Demonstration]:
        """Those of other prompts, oldest first."""
        words = _words(prompt)
        return [d for held, d in self._held if d.prompt != prompt and _overlap(held, words) < self.near_duplicate]

    def draw(self, prompt: str, count: int, rng: random.Random) -> list[Demonstration]:
        """`count` of those, or all where there are fewer, in random order."""
        found = self.others(prompt)
        return rng.sample(found, min(count, len(found)))


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    together = len(first | second)
    return len(first & second) / together if together else 0.0


class CycleAlignLoop:
    """sample -> rank -> agree -> teach the ranker -> train.

    sample: prompts, n -> n responses to each. ranker: see `rankers`. score: prompt, responses -> mean log-probability of a token of
    each, under the model as it sampled. train: rows -> metrics to log, or None; it is not called without rows. static: demonstrations
    shown with every question, except to their own prompt.

    ConfigError for settings that the loss does not have; InputError for a score that is not finite, and for another number of scores or
    responses than was asked for.
    """

    def __init__(
        self, sample: Sample, ranker: Ranker, score: Score, train: Train, static: Sequence[Demonstration] = (),
        config: CycleAlignLoopConfig | None = None,
    ) -> None:  # fmt: skip
        self.sample, self.ranker, self.score, self.train = sample, ranker, score, train
        self.config = config or CycleAlignLoopConfig(**{})
        registry.create("objective", self.config.loss, **self.config.loss_settings)  # a wrong setting is found before anything is paid for
        for number, shown in enumerate(static):
            if as_ranking(shown.ranking, len(shown.responses)) is None:
                raise InputError(f"static demonstration {number}: ranking must be a permutation of its responses, got {list(shown.ranking)}")
        self.static = DemonstrationPool(len(static), self.config.near_duplicate)
        for shown in static:
            self.static.push(shown)
        self.pool = DemonstrationPool(self.config.capacity, self.config.near_duplicate)
        self.iteration = 0

    def run(self, prompts: Sequence[str]) -> list[Iteration]:
        """Iterate until T iterations are over or every prompt has stopped: both rankers agree on it, or it had its interactions."""
        waiting = deque((prompt, 0) for prompt in prompts)
        done: list[Iteration] = []
        while waiting and len(done) < self.config.iterations:
            count = min(len(waiting), self.config.prompts_per_iteration or len(waiting))
            batch = [waiting.popleft() for _ in range(count)]
            done.append(self.step([prompt for prompt, _ in batch]))
            for (prompt, had), interaction in zip(batch, done[-1].interactions, strict=True):
                agreed = self.config.stop_when_agreed and interaction.complete
                if not agreed and had + 1 < self.config.max_interactions:
                    waiting.append((prompt, had + 1))
        return done

    def step(self, prompts: Sequence[str]) -> Iteration:
        """One iteration. All questions see the demonstrations from before it, so their order does not matter."""
        answers = self.sample(prompts, self.config.n)
        if len(answers) != len(prompts):
            raise InputError(f"sample: gave responses to {len(answers)} prompts, {len(prompts)} were asked")
        distinct = [merged(responses) for responses in answers]
        asked = [k for k, responses in enumerate(distinct) if len(responses) > 1]
        shown = {k: self._demonstrations(prompts[k], k) for k in asked}
        found, failures = self._rank([(prompts[k], distinct[k], shown[k]) for k in asked])
        ranked = dict(zip(asked, found, strict=True))
        interactions = [
            self._compare(prompt, tuple(distinct[k]), ranked[k]) if k in ranked else Interaction(prompt, tuple(distinct[k]))
            for k, prompt in enumerate(prompts)
        ]
        rows = []
        for interaction in interactions:
            if interaction.accepted:
                self.pool.push(demonstration(interaction))
                order = interaction.agreed if self.config.target == "agreement" else interaction.black_box or ()
                completions = [interaction.responses[i] for i in order]
                rows.append({"prompt": interaction.prompt, "completions": completions, "ranks": list(range(len(order)))})
        metrics = self._metrics(interactions, failures, len(rows))
        if rows:
            metrics |= {f"train/{name}": float(value) for name, value in (self.train(rows) or {}).items()}
        self.iteration += 1
        log.info("cyclealign iteration %d: %s", self.iteration, {name: round(value, 4) for name, value in metrics.items()})
        return Iteration(interactions, rows, metrics)

    def _demonstrations(self, prompt: str, place: int) -> list[Demonstration]:
        rng = random.Random(f"{self.config.seed} {self.iteration} {place}")
        return [*self.static.others(prompt), *self.pool.draw(prompt, self.config.dynamic, rng)]

    def _rank(self, asked: list[tuple[str, list[str], list[Demonstration]]]) -> tuple[list[tuple[int, ...] | None], int]:
        """Rankings, None where no answer could be read in all tries, and the number of answers that could not."""
        found: list[tuple[int, ...] | None] = [None] * len(asked)
        open_, failures = list(range(len(asked))), 0
        for _ in range(self.config.max_parse_retries + 1):
            answers = rank_all(self.ranker, [asked[k] for k in open_], self.config.threads)
            for k, answer in zip(open_, answers, strict=True):
                order = as_ranking(answer, len(asked[k][1]))
                found[k] = None if order is None else tuple(order)
            open_ = [k for k in open_ if found[k] is None]
            failures += len(open_)
        return found, failures

    def _compare(self, prompt: str, responses: tuple[str, ...], black_box: tuple[int, ...] | None) -> Interaction:
        """Both rankings of a prompt's responses, and what they share."""
        scores = tuple(float(s) for s in self.score(prompt, responses))
        if len(scores) != len(responses) or not all(math.isfinite(s) for s in scores):
            raise InputError(f"score: one finite number for each of {len(responses)} responses is needed, got {list(scores)}")
        white_box = tuple(sorted(range(len(scores)), key=lambda i: -scores[i]))  # stable: the lower index first
        agreed = () if black_box is None else tuple(agreement(black_box, white_box))
        return Interaction(prompt, responses, scores, black_box, white_box, agreed, len(agreed) >= self.config.least)

    def _metrics(self, interactions: Sequence[Interaction], failures: int, rows: int) -> dict[str, float]:
        read = [x for x in interactions if x.black_box]
        margin = float(self.config.loss_settings.get("margin", 0.0)) if self.config.loss == "rrhf" else 0.0
        hinges = [
            x.scores[j] - x.scores[i] + margin > 0
            for x in read if x.accepted
            for i, j in itertools.combinations(x.agreed if self.config.target == "agreement" else x.black_box or (), 2)
        ]  # fmt: skip
        return {
            "prompts": len(interactions), "rows": rows, "parse_failures": failures, "pool": len(self.pool),
            "skipped/responses": sum(len(x.responses) < 2 for x in interactions),
            "skipped/unread": sum(x.black_box is None for x in interactions),
            "agreement/length": _mean([len(x.agreed) for x in read]),
            "agreement/by_chance": _mean([chance_agreement(len(x.responses)) for x in read]),
            "agreement/accepted": _mean([x.accepted for x in read]), "agreement/complete": _mean([x.complete for x in read]),
            "hinges": _mean(hinges), "length_tau": length_tau(interactions),
        }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def merged(responses: Sequence[str]) -> list[str]:
    """The distinct responses in their order, equal up to white space; blank ones are left out."""
    found: dict[str, str] = {}
    for response in responses:
        found.setdefault(" ".join(response.split()), response)
    return [response for folded, response in found.items() if folded]


def demonstration(interaction: Interaction) -> Demonstration:
    """The agreed responses, in the order they were sampled in, with their ranking."""
    kept = sorted(interaction.agreed)
    return Demonstration(interaction.prompt, tuple(interaction.responses[i] for i in kept), tuple(kept.index(i) for i in interaction.agreed))


@cache
def chance_agreement(n: int) -> float:
    """Mean length of the order that two independent random rankings of n things share, by enumeration; NaN beyond 8."""
    if n > 8:
        return math.nan
    lengths = [len(agreement(order, range(n))) for order in itertools.permutations(range(n))]
    return sum(lengths) / len(lengths)


def length_tau(interactions: Sequence[Interaction]) -> float:
    """Kendall's tau of score and length in characters, over the pairs of a prompt whose lengths differ; NaN without one.

    Far below 0: the model's own ranking prefers what is short.
    """
    signs = [
        (1 if (len(x.responses[i]) > len(x.responses[j])) == (x.scores[i] > x.scores[j]) else -1)
        for x in interactions if x.scores
        for i, j in itertools.combinations(range(len(x.responses)), 2)
        if len(x.responses[i]) != len(x.responses[j])
    ]  # fmt: skip
    return _mean(signs)


class WhiteBox:
    """A Hugging Face causal LM as the loop's model: `sample`, `score`, `train`.

    args: TrainingArguments or PreferenceConfig of one iteration's training; the optimiser starts afresh in each. temperature, top_p,
    max_new_tokens: of sampling. score_by: "mean_logp", or "dpo_reward", the log-ratio of the whole response to the model as it was at
    first. Prompts go through the chat template where the tokenizer has one. dpo-list keeps the model as it was at first as its reference.
    Responses are scored and trained on as the tokens that were sampled; a list with others in it is tokenised as text, prompt + response.
    """

    def __init__(
        self, model: Any, tokenizer: Any, args: Any, config: CycleAlignLoopConfig, *, temperature: float = 1.0, top_p: float | None = 0.95,
        max_new_tokens: int = 64, batch_size: int | None = None, score_by: Literal["mean_logp", "dpo_reward"] = "mean_logp",
    ) -> None:  # fmt: skip
        if score_by not in ("mean_logp", "dpo_reward"):
            raise InputError(f"score_by: must be 'mean_logp' or 'dpo_reward', got {score_by!r}")
        self.model, self.tokenizer, self.args, self.config, self.score_by = model, tokenizer, args, config, score_by
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        kept = score_by == "dpo_reward" or config.loss == "dpo-list"
        self.first = copy.deepcopy(model).eval().requires_grad_(False) if kept else None
        self._rounds = 0
        self._sampled: dict[tuple[str, str], tuple[list[int], list[int]]] = {}  # ids of prompt and response, of the last round

    def sample(self, prompts: Sequence[str], n: int) -> list[list[str]]:
        """n responses to each prompt; every call draws anew from the config's seed."""
        from fairlead.generation import encode, generate

        self.model.eval()
        asked = [self._asked(prompt) for prompt in prompts]
        made = generate(self.model, self.tokenizer, asked, n=n, seed=self.config.seed + 1_000_003 * self._rounds, **self.sampling)
        self._rounds += 1
        self._sampled.clear()
        for prompt, question, group in zip(prompts, asked, made, strict=True):
            prompt_ids = encode(self.tokenizer, question).tolist()
            for g in group:
                self._sampled.setdefault((prompt, g.text), (prompt_ids, g.ids.tolist()))
        return [[g.text for g in group] for group in made]

    def score(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """Mean log-probability of a response's tokens, or its log-ratio to the first model."""
        import torch

        from .statistics import sequence_stats

        rows = self._tokenised([{"prompt": prompt, "completions": list(responses), "ranks": list(range(len(responses)))}])
        self.model.eval()
        with torch.no_grad():
            own = sequence_stats(self.model, rows)
            if self.score_by == "mean_logp":
                return [float(x) for x in own.logp / own.length]
            return [float(x) for x in own.logp.cpu() - sequence_stats(self.first, rows).logp.cpu()]

    def train(self, rows: list[Row]) -> dict[str, float]:
        """One run of PreferenceTrainer on the rows."""
        from .trainer import PreferenceTrainer

        trainer = PreferenceTrainer(
            self.model, self.config.loss, copy.copy(self.args), self._tokenised(rows), processing_class=self.tokenizer,
            ref_model=self.first if self.config.loss == "dpo-list" else None, objective_settings=self.config.loss_settings,
        )  # fmt: skip
        trainer.train()
        self.model.eval()
        logged: dict[str, Any] = {}
        for entry in trainer.state.log_history:
            logged |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        return {name: logged[name] for name in ("train_loss", "grad_norm", "rewards/accuracies", "rrhf/active") if name in logged}

    def _tokenised(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The rows with the ids that were sampled, where all responses of a row were."""
        from .tokens import tokenize

        found = []
        for row in rows:
            ids = [self._sampled.get((row["prompt"], text)) for text in row["completions"]]
            known = [pair for pair in ids if pair is not None]
            if len(known) == len(ids):
                found.append({"prompt_ids": known[0][0], "completion_ids": [answer for _, answer in known], "rank": row["ranks"]})
            else:
                found += tokenize([{**row, "prompt": self._asked(row["prompt"])}], self.tokenizer, max_length=None)[0]
        return found

    def _asked(self, prompt: str) -> Any:
        return [{"role": "user", "content": prompt}] if getattr(self.tokenizer, "chat_template", None) else prompt


def cyclealign(
    model: Any, tokenizer: Any, prompts: Sequence[str], ranker: Ranker, args: Any, *, static: Sequence[Demonstration] = (),
    config: CycleAlignLoopConfig | None = None, **sampling: Any,
) -> list[Iteration]:  # fmt: skip
    """Train `model` in place on prompts and a ranker; what each iteration did. sampling: the further settings of `WhiteBox`."""
    if getattr(args, "world_size", 1) > 1:
        raise InputError("cyclealign: runs on one process; each of several would ask the ranker for itself and get other orders")
    config = config or CycleAlignLoopConfig(**{})
    box = WhiteBox(model, tokenizer, args, config, **sampling)
    return CycleAlignLoop(box.sample, ranker, box.score, box.train, static, config).run(prompts)
