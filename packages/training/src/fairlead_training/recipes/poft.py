"""`fairlead run poft`: fine-tuning on noisy answers, plain and against the likelihood of aligned models.

Preference-Oriented Supervised Fine-Tuning (PoFT, arXiv 2412.12865) in two toys. x ~ N(0, I_16), and each token of the
answer is argmax(xW_t). One token, ten classes: 40 % of the training answers are drawn anew at random. Three tokens, six
classes: in 40 % of the training rows two tokens are exchanged. Aligned models saw clean rows only, and few of them. Every model is a
two-layer network that reads x and the tokens before. The objectives are the package's `poft` and `sft`.

Shapes: N rows, T answer tokens, I inputs, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import one_hot

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.runs import Run

INPUTS, WIDTH = 16, 128
SWAPS = [[1, 0, 2], [0, 2, 1], [2, 1, 0]]


class Arm(NamedTuple):
    """A way to train: the objective, the step at which the aligned models stopped, whether on the better half of the rows by
    r_bar only, a factor of the learning rate."""

    objective: str
    stop: int = 200
    better_half: bool = False
    rate: float = 1.0


class Part(NamedTuple):
    """A toy: tokens of an answer, classes of a token, width of the aligned models, arms; must show: least gain of PoFT over
    CE at the end, least ratio of tau on clean rows to tau on spoilt ones."""

    tokens: int
    classes: int
    aligned_width: int
    arms: Mapping[str, Arm]
    gain: float
    ratio: float


ARMS = {
    "CE": Arm("sft"), "CE, half the learning rate": Arm("sft", rate=0.5),
    "PoFT": Arm("poft"), "PoFT, aligned models of 60 steps": Arm("poft", 60), "PoFT, aligned models of 600 steps": Arm("poft", 600),
    "CE on the better half": Arm("sft", better_half=True), "PoFT on the better half": Arm("poft", better_half=True),
}  # fmt: skip
PARTS = {
    "one token": Part(1, 10, 32, ARMS, 0.15, 4.0),
    "three tokens": Part(3, 6, 64, {name: ARMS[name] for name in ("CE", "PoFT")}, 0.075, 2.0),
}


class PoFTConfig(MethodConfig):
    """Sizes; the defaults take about two minutes on one core."""

    replicates: int = Field(5, ge=1, description="worlds of each toy, seeded 5 seed, 5 seed + 1, ... by default")
    rows: int = Field(600, ge=2, description="training rows, all in each step")
    noise: float = Field(0.4, gt=0, lt=1, description="share of the training rows whose answer is spoilt")
    test: int = Field(2000, ge=1, description="clean rows on which accuracy is measured")
    steps: int = Field(400, ge=1, description="Adam steps of the target")
    early: int = Field(50, ge=1, description="step of the first reading")
    aligned_models: int = Field(3, ge=1, description="aligned models of a world")
    aligned_learning_rate: float = Field(1e-2, gt=0, description="learning rate of the aligned models")
    aligned_rows: int = Field(150, ge=1, description="clean rows of each aligned model, answers of one token")
    sequence_aligned_rows: int = Field(600, ge=1, description="the same, answers of three tokens")
    learning_rate: float = Field(3e-3, gt=0, description="learning rate of the target")


class PoFT(Recipe):
    """Cross-entropy, PoFT and filtering on noisy answers of one token and of three."""

    Config = PoFTConfig
    config: PoFTConfig

    def __call__(self, run: Run) -> None:
        run.describe("PoFT", "Fine-tuning on noisy answers, plain and against the likelihood of aligned models.", "2412.12865")
        rows = []
        for name, part in PARTS.items():
            for index in range(self.config.replicates):
                run.progress(name, index, self.config.replicates)
                seed = run.seed * self.config.replicates + index
                found = run.stage(f"{name}-{index}", partial(compare, self.config, part, seed))
                rows += [{"part": name, "seed": seed, **row} for row in found]
        report(run, rows)


class Rows(NamedTuple):
    """Features [N, T, F], answers int64 [N, T], whether each answer is the right one, bool [N]."""

    features: torch.Tensor
    answers: torch.Tensor
    clean: torch.Tensor


class World(NamedTuple):
    """Training rows with noise, clean test rows, clean rows of each aligned model."""

    train: Rows
    test: Rows
    aligned: list[Rows]


def world(config: PoFTConfig, part: Part, seed: int) -> World:
    """The data of one toy."""
    g = torch.Generator().manual_seed(seed)
    weight_TIC = torch.randn(part.tokens, INPUTS, part.classes, generator=g)

    def draw(count: int, noise: float = 0.0) -> Rows:
        x_NI = torch.randn(count, INPUTS, generator=g)
        right_NT = torch.einsum("ni,tic->ntc", x_NI, weight_TIC).argmax(-1)
        spoilt_N = torch.rand(count, generator=g) < noise
        if part.tokens == 1:
            other_NT = torch.randint(0, part.classes, (count, 1), generator=g)
        else:
            other_NT = right_NT.gather(1, torch.tensor(SWAPS)[torch.randint(0, len(SWAPS), (count,), generator=g)])
        answer_NT = torch.where(spoilt_N[:, None], other_NT, right_NT)
        return Rows(features(x_NI, answer_NT, part.classes), answer_NT, (answer_NT == right_NT).all(1))

    train, test = draw(config.rows, config.noise), draw(config.test)
    own = config.aligned_rows if part.tokens == 1 else config.sequence_aligned_rows
    return World(train, test, [draw(own) for _ in range(config.aligned_models)])


def features(x_NI: torch.Tensor, answer_NT: torch.Tensor, classes: int) -> torch.Tensor:
    """What each token is predicted from, [N, T, F]: x, the tokens before it, its place."""
    count, tokens = answer_NT.shape
    before_NSC = one_hot(answer_NT[:, :-1], classes).to(x_NI.dtype)
    seen_TS = torch.ones(tokens, tokens - 1).tril(-1)
    before_NTF = (seen_TS[:, :, None] * before_NSC[:, None]).flatten(2)
    place_TF = torch.eye(tokens)[:, 1:]
    return torch.cat([x_NI[:, None].expand(-1, tokens, -1), before_NTF, place_TF.expand(count, -1, -1)], -1)


def network(part: Part, width: int, seed: int) -> torch.nn.Module:
    """An untrained network, features [.., F] -> logits [.., C]."""
    size = INPUTS + (part.tokens - 1) * (part.classes + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(size, width), torch.nn.ReLU(), torch.nn.Linear(width, part.classes))


def statistics(model: Any, rows: Rows, r_bar_N: torch.Tensor) -> SequenceStats:
    """What an objective sees of the rows."""
    logp_NT = model(rows.features).log_softmax(-1).gather(-1, rows.answers[..., None])[..., 0]
    length_N = torch.full_like(rows.answers[:, 0], rows.answers.shape[1])
    return SequenceStats(logp_NT.sum(1), length_N, extra={"ref_logp_mean": r_bar_N})


def descend(model: Any, objective: str, rows: Rows, r_bar_N: torch.Tensor, steps: int, learning_rate: float) -> Iterator[int]:
    """Full-batch Adam steps of an objective; yields the number of each step once it is taken."""
    loss, optimizer = registry.create("objective", objective), torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(statistics(model, rows, r_bar_N)).loss.backward()
        optimizer.step()
        yield step


@torch.no_grad()
def token_mean(model: Any, rows: Rows) -> torch.Tensor:
    """Mean log-probability of a token of each answer, [N]."""
    stats = statistics(model, rows, torch.zeros(len(rows.clean)))
    return stats.logp / stats.length


@torch.no_grad()
def accuracy(model: Any, rows: Rows) -> float:
    """Share of answers that greedy decoding gets right: each token is the likeliest after the right ones before it."""
    return float((model(rows.features).argmax(-1) == rows.answers).all(1).float().mean())


def compare(config: PoFTConfig, part: Part, seed: int) -> list[dict[str, Any]]:
    """Every arm in one world: accuracy early and at the end, mean tau of clean and of spoilt rows, what r_bar is worth."""
    place = world(config, part, seed)
    stops = {arm.stop for arm in part.arms.values()}
    scores: dict[int, list[torch.Tensor]] = {stop: [] for stop in stops}
    skill: dict[int, list[float]] = {stop: [] for stop in stops}
    for index, own in enumerate(place.aligned):
        model = network(part, part.aligned_width, 10 * seed + index)
        for step in descend(model, "sft", own, torch.zeros(len(own.clean)), max(stops), config.aligned_learning_rate):
            if step in stops:
                scores[step].append(token_mean(model, place.train))
                skill[step].append(accuracy(model, place.test))
    clean_N, found = place.train.clean, []
    for name, arm in part.arms.items():
        r_bar_N = torch.stack(scores[arm.stop]).mean(0)
        kept_N = r_bar_N >= r_bar_N.median() if arm.better_half else torch.ones_like(clean_N)
        rows, early = Rows(*(column[kept_N] for column in place.train)), 0.0
        model = network(part, WIDTH, 10 * seed + 9)
        for step in descend(model, arm.objective, rows, r_bar_N[kept_N], config.steps, arm.rate * config.learning_rate):
            if step == min(config.early, config.steps):
                early = accuracy(model, place.test)
        tau_N = torch.sigmoid(r_bar_N - token_mean(model, place.train))
        found.append({
            "arm": name, "early": early, "end": accuracy(model, place.test), "tau_clean": float(tau_N[clean_N].mean()),
            "tau_spoilt": float(tau_N[~clean_N].mean()), "sd_r_bar": float(r_bar_N.std()), "aligned": float(np.mean(skill[arm.stop])),
        })  # fmt: skip
    return found


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
    titles = {
        "early": "early", "end": "at the end", "tau_clean": "tau, clean rows", "tau_spoilt": "tau, spoilt rows", "sd_r_bar": "s.d. of r_bar",
        "aligned": "aligned models",
    }  # fmt: skip
    for name, part in PARTS.items():
        run.table(
            f"Accuracy, {name}", [{"arm": arm, **{titles[k]: _spread(column(name, arm, k)) for k in titles}} for arm in part.arms],
            note="Mean, least to largest over the worlds. tau is that of all training rows at the end, also of arms that do not use it.",
        )  # fmt: skip
        gain = column(name, "PoFT", "end") - column(name, "CE", "end")
        ours, theirs = (column(name, arm, "early") - column(name, arm, "end") for arm in ("PoFT", "CE"))
        ratio = column(name, "PoFT", "tau_clean") / column(name, "PoFT", "tau_spoilt")
        run.check(f"{name}: PoFT at least {part.gain:g} above CE at the end, every world", bool((gain >= part.gain).all()), _list(gain))
        run.check(f"{name}: PoFT drops less than CE from early to the end, every world", bool((ours < theirs).all()), f"PoFT {_list(ours)}; CE {_list(theirs)}")
        run.check(f"{name}: tau on clean rows at least {part.ratio:g} times that on spoilt ones, every world", bool((ratio >= part.ratio).all()), _list(ratio))
        run.headline(f"PoFT over CE, {name}", f"{gain.mean():+.3f}", f"{gain.min():+.3f} to {gain.max():+.3f}")


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
