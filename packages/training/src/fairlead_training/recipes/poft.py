"""`fairlead run poft`: fine-tuning on noisy answers, plain and against the likelihood of aligned models.

Preference-Oriented Supervised Fine-Tuning (PoFT, arXiv 2412.12865) in two toys. One token: x ~ N(0, I_16), the answer is
argmax(xW) among ten, 40 % of the training answers are drawn anew at random, the networks have one hidden layer. Three
tokens: a two-layer Llama answers three symbols with the image of each under a permutation of its place, and in 40 % of
the training rows two tokens of the answer are exchanged. Aligned models saw clean rows only, and few of them. The
objectives are the package's `poft` and `sft`.

Shapes: N rows, I inputs, C classes, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.runs import Run

from ..statistics import sequence_stats

INPUTS, CLASSES, SYMBOLS, TOKENS = 16, 10, 8, 3
STOPS = (60, 200, 600)


class Arm(NamedTuple):
    """A way to train: the objective, the step at which the aligned models stopped, whether on the better half of the rows by
    r_bar only, a factor of the learning rate."""

    objective: str
    stop: int
    better_half: bool = False
    rate: float = 1.0


ARMS = {
    "CE": Arm("sft", 200), "CE, half the learning rate": Arm("sft", 200, rate=0.5),
    "PoFT": Arm("poft", 200), "PoFT, aligned models of 60 steps": Arm("poft", 60), "PoFT, aligned models of 600 steps": Arm("poft", 600),
    "CE on the better half": Arm("sft", 200, better_half=True), "PoFT on the better half": Arm("poft", 200, better_half=True),
}  # fmt: skip
# Part: least gain of PoFT over CE at the end, least ratio of tau on clean rows to tau on spoilt rows.
THRESHOLDS = {"one token": (0.15, 4.0), "three tokens": (0.075, 2.0)}


class PoFTConfig(MethodConfig):
    """Sizes; the defaults take about three minutes on one core."""

    replicates: int = Field(5, ge=1, description="worlds of one-token answers, seeded 5 seed, 5 seed + 1, ... by default")
    sequence_replicates: int = Field(3, ge=1, description="worlds of three-token answers, seeded from the same number on")
    noise: float = Field(0.4, gt=0, lt=1, description="share of the training rows whose answer is spoilt")
    test: int = Field(2000, ge=1, description="clean rows on which accuracy is measured")
    aligned_models: int = Field(3, ge=1, description="aligned models of a world")
    steps: int = Field(400, ge=1, description="Adam steps of the target")
    early: int = Field(50, ge=1, description="step of the first reading")
    rows: int = Field(600, ge=2, description="one token: training rows, all in each step")
    aligned_rows: int = Field(150, ge=1, description="one token: clean rows of each aligned model")
    learning_rate: float = Field(3e-3, gt=0, description="one token: learning rate of the target")
    aligned_learning_rate: float = Field(1e-2, gt=0, description="one token: learning rate of the aligned models")
    sequence_rows: int = Field(400, ge=2, description="three tokens: training rows")
    sequence_batch: int = Field(40, ge=1, description="three tokens: rows of a step")
    sequence_aligned_rows: int = Field(200, ge=1, description="three tokens: clean rows of each aligned model")
    sequence_aligned_steps: int = Field(250, ge=1, description="three tokens: steps of the aligned models")
    sequence_learning_rate: float = Field(5e-3, gt=0, description="three tokens: learning rate of all models")


class PoFT(Recipe):
    """Cross-entropy, PoFT and filtering on noisy answers of one token and of three."""

    Config = PoFTConfig
    config: PoFTConfig

    def __call__(self, run: Run) -> None:
        run.describe("PoFT", "Fine-tuning on noisy answers, plain and against the likelihood of aligned models.", "2412.12865")
        rows = []
        parts = ("one token", token_world, self.config.replicates), ("three tokens", sequence_world, self.config.sequence_replicates)
        for part, world, count in parts:
            for index in range(count):
                run.progress(part, index, count)
                seed = run.seed * self.config.replicates + index
                found = run.stage(f"{part}-{index}", partial(compare, self.config, world, seed))
                rows += [{"part": part, "seed": seed, **row} for row in found]
        report(run, rows)


class Rows(NamedTuple):
    """Inputs [N, I], answers int64 [N, T], whether each answer is the right one, bool [N]."""

    inputs: torch.Tensor
    answers: torch.Tensor
    clean: torch.Tensor

    def take(self, kept: torch.Tensor) -> Rows:
        """Rows by index or mask."""
        return Rows(*(column[kept] for column in self))


class World(NamedTuple):
    """Data and models of one toy. aligned: clean rows of each aligned model. network: seed, whether it is an aligned one ->
    untrained model. stats: model, rows, r_bar [N] -> what an objective sees. correct: model, rows -> bool [N]."""

    train: Rows
    test: Rows
    aligned: list[Rows]
    network: Callable[[int, bool], torch.nn.Module]
    stats: Callable[[Any, Rows, torch.Tensor], SequenceStats]
    correct: Callable[[Any, Rows], torch.Tensor]
    arms: Mapping[str, Arm]
    stops: tuple[int, ...]
    rates: tuple[float, float]  # of the target, of the aligned models
    batch: int | None = None


def token_world(config: PoFTConfig, seed: int) -> World:
    """Answers of one token, networks of one hidden layer, all rows in each step."""
    g = torch.Generator().manual_seed(seed)
    weight_IC = torch.randn(INPUTS, CLASSES, generator=g)

    def draw(count: int, noise: float = 0.0) -> Rows:
        x_NI = torch.randn(count, INPUTS, generator=g)
        right_N = (x_NI @ weight_IC).argmax(-1)
        spoilt_N = torch.rand(count, generator=g) < noise
        answer_N = torch.where(spoilt_N, torch.randint(0, CLASSES, (count,), generator=g), right_N)
        return Rows(x_NI, answer_N[:, None], answer_N == right_N)

    def network(seed: int, aligned: bool) -> torch.nn.Module:
        width = 32 if aligned else 128
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.nn.Sequential(torch.nn.Linear(INPUTS, width), torch.nn.ReLU(), torch.nn.Linear(width, CLASSES))

    def stats(model: Any, rows: Rows, r_bar_N: torch.Tensor) -> SequenceStats:
        logp_N = model(rows.inputs).log_softmax(-1).gather(1, rows.answers)[:, 0]
        return SequenceStats(logp_N, torch.ones(len(logp_N), dtype=torch.int64), extra={"ref_logp_mean": r_bar_N})

    def correct(model: Any, rows: Rows) -> torch.Tensor:
        found: torch.Tensor = model(rows.inputs).argmax(-1) == rows.answers[:, 0]
        return found

    train, test = draw(config.rows, config.noise), draw(config.test)
    aligned = [draw(config.aligned_rows) for _ in range(config.aligned_models)]
    rates = config.learning_rate, config.aligned_learning_rate
    return World(train, test, aligned, network, stats, correct, ARMS, STOPS, rates)


def sequence_world(config: PoFTConfig, seed: int) -> World:
    """Answers of three tokens, Llamas of two layers."""
    g = torch.Generator().manual_seed(seed)
    image_TC = torch.stack([torch.randperm(SYMBOLS, generator=g) for _ in range(TOKENS)])
    swaps = torch.tensor([[1, 0, 2], [0, 2, 1], [2, 1, 0]])

    def draw(count: int, noise: float = 0.0) -> Rows:
        prompt_NT = torch.randint(0, SYMBOLS, (count, TOKENS), generator=g)
        right_NT = image_TC.gather(1, prompt_NT.T).T
        order_NT = swaps[torch.randint(0, len(swaps), (count,), generator=g)]
        spoilt_N = torch.rand(count, generator=g) < noise
        answer_NT = torch.where(spoilt_N[:, None], right_NT.gather(1, order_NT), right_NT)
        return Rows(prompt_NT, answer_NT, (answer_NT == right_NT).all(1))

    def network(seed: int, aligned: bool) -> torch.nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(vocab_size=SYMBOLS, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes))

    def stats(model: Any, rows: Rows, r_bar_N: torch.Tensor) -> SequenceStats:
        columns = zip(rows.inputs.tolist(), rows.answers.tolist(), r_bar_N.tolist(), strict=True)
        told = [{"prompt_ids": p, "completion_ids": [answer], "ref_logp_mean": [r_bar]} for p, answer, r_bar in columns]
        return sequence_stats(model, told, packed=False)

    def correct(model: Any, rows: Rows) -> torch.Tensor:
        """Whether the greedy answer is right: then, and only then, each token is the likeliest after the right ones."""
        ids = torch.cat([rows.inputs, rows.answers], 1)
        likeliest_NT = model(input_ids=ids, use_cache=False).logits[:, TOKENS - 1 : -1].argmax(-1)
        return (likeliest_NT == rows.answers).all(1)

    train, test = draw(config.sequence_rows, config.noise), draw(config.test)
    aligned = [draw(config.sequence_aligned_rows) for _ in range(config.aligned_models)]
    stop, rate = config.sequence_aligned_steps, config.sequence_learning_rate
    arms = {"CE": Arm("sft", stop), "PoFT": Arm("poft", stop)}
    return World(train, test, aligned, network, stats, correct, arms, (stop,), (rate, rate), config.sequence_batch)


def descend(world: World, model: Any, objective: str, rows: Rows, r_bar_N: torch.Tensor, steps: int, learning_rate: float) -> Iterator[int]:
    """Adam steps of an objective; yields the number of each step once it is taken."""
    loss, g = registry.create("objective", objective), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(1, steps + 1):
        drawn = torch.arange(len(r_bar_N)) if world.batch is None else torch.randperm(len(r_bar_N), generator=g)[: world.batch]
        optimizer.zero_grad()
        loss(world.stats(model, rows.take(drawn), r_bar_N[drawn])).loss.backward()
        optimizer.step()
        yield step


@torch.no_grad()
def token_mean(world: World, model: Any, rows: Rows) -> torch.Tensor:
    """Mean log-probability of a token of each answer, [N]."""
    stats = world.stats(model, rows, torch.zeros(len(rows.clean)))
    return stats.logp / stats.length


def compare(config: PoFTConfig, make: Callable[[PoFTConfig, int], World], seed: int) -> list[dict[str, Any]]:
    """Every arm in one world: accuracy early and at the end, mean tau of clean and of spoilt rows, spread of r_bar."""
    world = make(config, seed)
    target_rate, aligned_rate = world.rates
    scores: dict[int, list[torch.Tensor]] = {stop: [] for stop in world.stops}
    skill: dict[int, list[float]] = {stop: [] for stop in world.stops}
    for index, own in enumerate(world.aligned):
        model = world.network(10 * seed + index, True)
        for step in descend(world, model, "sft", own, torch.zeros(len(own.clean)), max(world.stops), aligned_rate):
            if step in scores:
                scores[step].append(token_mean(world, model, world.train))
                skill[step].append(accuracy(world, model))
    found = []
    for name, arm in world.arms.items():
        r_bar_N = torch.stack(scores[arm.stop]).mean(0)
        kept = r_bar_N >= r_bar_N.median() if arm.better_half else torch.ones_like(world.train.clean)
        rows, reference_N = world.train.take(kept), r_bar_N[kept]
        model = world.network(10 * seed + 9, False)
        early = 0.0
        for step in descend(world, model, arm.objective, rows, reference_N, config.steps, arm.rate * target_rate):
            if step == min(config.early, config.steps):
                early = accuracy(world, model)
        tau_N = torch.sigmoid(r_bar_N - token_mean(world, model, world.train))
        clean_N = world.train.clean
        found.append({
            "arm": name, "early": early, "end": accuracy(world, model), "tau_clean": float(tau_N[clean_N].mean()),
            "tau_spoilt": float(tau_N[~clean_N].mean()), "sd_r_bar": float(r_bar_N.std()), "aligned": float(np.mean(skill[arm.stop])),
        })  # fmt: skip
    return found


@torch.no_grad()
def accuracy(world: World, model: Any) -> float:
    """Share of the test rows that are answered rightly."""
    return float(world.correct(model, world.test).float().mean())


def report(run: Run, rows: list[dict[str, Any]]) -> None:
    """Tables and thresholds."""

    def column(part: str, arm: str, name: str) -> np.ndarray:
        return np.array([x[name] for x in rows if (x["part"], x["arm"]) == (part, arm)])

    for x in rows:
        for name in ("early", "end", "tau_clean", "tau_spoilt"):
            run.metric(name, x[name], part=x["part"], seed=x["seed"], arm=x["arm"])
    run.section(
        "What noisy answers do",
        "Cross-entropy learns the noise with the rest and loses accuracy. PoFT weights each row by tau, which is small where aligned models "
        "find the answer unlikely, and where the target already likes it better than they do. A quality filter by the same scores may be put "
        "before it. The more confident the aligned models are (s.d. of r_bar), the more they say about a row; their accuracy hardly moves.",
    )
    for part, (gain, ratio) in THRESHOLDS.items():
        arms = list(dict.fromkeys(x["arm"] for x in rows if x["part"] == part))
        shown = {"early": "early", "end": "at the end", "tau_clean": "tau, clean rows", "tau_spoilt": "tau, spoilt rows", "sd_r_bar": "s.d. of r_bar", "aligned": "aligned models"}
        run.table(
            f"Accuracy, {part}", [{"arm": arm, **{title: _spread(column(part, arm, name)) for name, title in shown.items()}} for arm in arms],
            note="Mean, least to largest over the worlds. tau is measured on all training rows at the end, also of arms that do not use it.",
        )  # fmt: skip
        gained = column(part, "PoFT", "end") - column(part, "CE", "end")
        drops = [column(part, arm, "early") - column(part, arm, "end") for arm in ("PoFT", "CE")]
        weights = column(part, "PoFT", "tau_clean") / column(part, "PoFT", "tau_spoilt")
        run.check(f"{part}: PoFT at least {gain:g} above CE at the end, every world", bool((gained >= gain).all()), _list(gained))
        run.check(f"{part}: PoFT loses less from early to end than CE, every world", bool((drops[0] < drops[1]).all()), f"PoFT {_list(drops[0])}; CE {_list(drops[1])}")
        run.check(f"{part}: tau on clean rows at least {ratio:g} times that on spoilt ones, every world", bool((weights >= ratio).all()), _list(weights))
        run.headline(f"PoFT over CE, {part}", f"{gained.mean():+.3f}", f"{gained.min():+.3f} to {gained.max():+.3f}")


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
