"""`fairlead run cyclealign`: how right the orders are on which two rankers agree, and whether teaching the ranker pays.

CycleAlign (arXiv 2310.16271) on simulated rankers, where the right order is known, and its loop on tabular policies, where
expected quality is exact. The loop, the agreement and the loss are the package's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.runs import Run

from ..cyclealign_loop import CycleAlignLoop, CycleAlignLoopConfig, Iteration, Row, chance_agreement
from ..objectives.cyclealign import agreement
from ..rankers import Demonstration

BLACK, WHITE = 0.8, 1.2  # noise of the two rankers on a quality that is N(0, 1)
LENGTHS = (4, 6)
# Arm: what a row holds, dynamic demonstrations per question, whether the labels are shuffled.
ARMS: dict[str, tuple[str, int, bool]] = {
    "agreement, dynamic": ("agreement", 2, False), "agreement, static": ("agreement", 0, False),
    "black box, dynamic": ("black_box", 2, False), "black box, static": ("black_box", 0, False),
    "agreement, shuffled": ("agreement", 2, True),
}  # fmt: skip
# Responses 0, 1, 2, 3 fall in quality; in this order three of their six pairs are right.
STATIC = [Demonstration(f"static {k}", ("0", "1", "2", "3"), (1, 3, 0, 2)) for k in range(2)]


class CycleAlignConfig(MethodConfig):
    """Sizes; the defaults finish in under a minute on one core."""

    simulations: int = Field(3, ge=1, description="simulations of two rankers, seeded 3 seed, 3 seed + 1, ... by default")
    lists: int = Field(4000, ge=2, description="ranked lists of a simulation")
    worlds: int = Field(5, ge=2, description="worlds of the loop, seeded 5 seed, 5 seed + 1, ... by default")
    prompts: int = Field(256, ge=4, description="prompts of a world")
    answers: int = Field(8, ge=2, description="responses that a prompt has")
    n: int = Field(5, ge=2, description="responses sampled per prompt and iteration, all different")
    iterations: int = Field(5, ge=3, description="iterations of the loop")


class CycleAlign(Recipe):
    """Orders two rankers agree on are more often right; dynamic demonstrations pay where they beat the static ones."""

    Config = CycleAlignConfig
    config: CycleAlignConfig

    def __call__(self, run: Run) -> None:
        run.describe("CycleAlign", "What the agreement of two rankers is worth, and a loop that teaches one of them.", "2310.16271")
        c = self.config
        orders: list[dict[str, Any]] = []
        for index in range(c.simulations):
            orders += run.stage(f"orders-{index}", partial(simulate, c, run.seed * c.simulations + index))
        report_orders(run, orders)
        loops: list[dict[str, Any]] = []
        for index in range(c.worlds):
            run.progress("worlds", index, c.worlds)
            loops += run.stage(f"loop-{index}", partial(loops_of, c, run.seed * c.worlds + index))
        report_loops(run, loops)


def simulate(config: CycleAlignConfig, seed: int) -> list[dict[str, Any]]:
    """Share of rightly ordered pairs of the two rankers, of their agreement, and of that with a ranking by chance."""
    rng = np.random.default_rng([seed, 1])
    rows = []
    for n in LENGTHS:
        quality = rng.standard_normal((config.lists, n))
        ranked = {
            "black box": quality + BLACK * rng.standard_normal(quality.shape),
            "white box": quality + WHITE * rng.standard_normal(quality.shape),
            "chance": rng.standard_normal(quality.shape),
        }
        order = {name: (-values).argsort(1, kind="stable").tolist() for name, values in ranked.items()}
        agreed = {name: [agreement(b, w) for b, w in zip(order["black box"], order[name], strict=True)] for name in ("white box", "chance")}
        rows.append(
            {
                "seed": seed, "n": n, "black box": right_pairs(quality, order["black box"]), "white box": right_pairs(quality, order["white box"]),
                "agreement": right_pairs(quality, agreed["white box"]), "length": float(np.mean([len(a) for a in agreed["white box"]])),
                "with chance": right_pairs(quality, agreed["chance"]), "length with chance": float(np.mean([len(a) for a in agreed["chance"]])),
            }
        )  # fmt: skip
    return rows


def right_pairs(quality: Any, rankings: Sequence[Sequence[int]]) -> float:
    """Share of rightly ordered pairs of rankings (best first) over qualities [N, n], pooled over all of their pairs."""
    right = [values[i] > values[j] for values, ranking in zip(quality, rankings, strict=True) for i, j in combinations(ranking, 2)]
    return sum(map(bool, right)) / len(right) if right else math.nan


class TabularLoop:
    """A world as the loop sees it: a tabular policy, and a black box whose noise falls as its demonstrations get better.

    Prompts are "0", "1", ..., responses likewise. Noise depends on seed and iteration alone, so that arms are paired.
    Shapes: P prompts, A answers.
    """

    def __init__(self, config: CycleAlignConfig, seed: int, shuffled: bool = False) -> None:
        self.seed, self.shuffled, self.iteration = seed, shuffled, 0
        g = torch.Generator().manual_seed(seed)
        self.quality, noise = torch.randn(2, config.prompts, config.answers, generator=g, dtype=torch.float64)
        self.logits = 0.7 * (self.quality + 1.2 * noise)
        self.known = {str(p): values for p, values in enumerate(self.quality.tolist())} | {d.prompt: [3.0, 2.0, 1.0, 0.0] for d in STATIC}
        self.black_noise: list[list[float]] = []
        self.logp: list[list[float]] = []
        self.loss = registry.create("objective", "pro")

    def sample(self, prompts: Sequence[str], n: int) -> list[list[str]]:
        """n different responses to each prompt (Gumbel top-k); the black box gets new noise."""
        g = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + self.iteration)
        self.iteration += 1
        uniform, noise = torch.rand(self.logits.shape, generator=g, dtype=torch.float64), torch.randn(self.logits.shape, generator=g)
        self.black_noise, self.logp = noise.tolist(), self.logits.log_softmax(-1).tolist()
        drawn = (self.logits - (-uniform.clamp(1e-300, 1).log()).log()).topk(n, dim=1).indices
        return [[str(a) for a in drawn[int(p)].tolist()] for p in prompts]

    def rank(self, prompt: str, responses: Sequence[str], demonstrations: Sequence[Demonstration]) -> list[int]:
        """The order by quality and noise of 1.2 - 0.8 c, c the mean share of right pairs in the demonstrations shown."""
        correct = [right_pairs([[self.known[d.prompt][int(r)] for r in d.responses]], [d.ranking]) for d in demonstrations]
        sigma = 1.2 - 0.8 * sum(correct) / len(correct)
        seen = [self.known[prompt][int(r)] + sigma * self.black_noise[int(prompt)][int(r)] for r in responses]
        return sorted(range(len(seen)), key=lambda i: -seen[i])

    def score(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """Log-probabilities: a response is one token."""
        return [self.logp[int(prompt)][int(r)] for r in responses]

    def train(self, rows: list[Row]) -> None:
        """Five gradient steps of PRO, of size 0.3 on each list."""
        generator = torch.Generator().manual_seed(7919 * (self.seed + 1) + self.iteration)
        answers = [[int(r) for r in row["completions"]] for row in rows]
        if self.shuffled:
            answers = [[a[k] for k in torch.randperm(len(a), generator=generator).tolist()] for a in answers]
        prompt = torch.tensor([int(row["prompt"]) for row, a in zip(rows, answers, strict=True) for _ in a])
        answer = torch.tensor([r for a in answers for r in a])
        group, rank = (torch.tensor([pair[k] for pair in ((g, i) for g, a in enumerate(answers) for i in range(len(a)))]) for k in (0, 1))
        for _ in range(5):
            logits = self.logits.detach().requires_grad_(True)
            stats = SequenceStats(logits.log_softmax(-1)[prompt, answer], torch.ones_like(group), group=group, rank=rank)
            (gradient,) = torch.autograd.grad(self.loss(stats).loss * len(rows), logits)
            self.logits = self.logits - 0.3 * gradient

    def value(self) -> float:
        """Expected quality of a response."""
        return float((self.logits.softmax(-1) * self.quality).sum(1).mean())


def loops_of(config: CycleAlignConfig, seed: int) -> list[dict[str, Any]]:
    """Every arm in one world: expected quality after each iteration, and the black box's share of right pairs in it."""
    rows = []
    for arm, (target, dynamic, shuffled) in ARMS.items():
        world = TabularLoop(config, seed, shuffled)
        settings: dict[str, Any] = {"n": config.n, "loss": "pro", "target": target, "dynamic": dynamic, "seed": seed}
        loop = CycleAlignLoop(world.sample, world.rank, world.score, world.train, STATIC, CycleAlignLoopConfig(**settings))
        quality, accuracy, hinges = [world.value()], [], []
        for _ in range(config.iterations):
            done = loop.step([str(p) for p in range(config.prompts)])
            quality.append(world.value())
            accuracy.append(ranker_accuracy(world, done))
            hinges.append(done.metrics["hinges"])
        rows.append({"seed": seed, "arm": arm, "quality": quality, "accuracy": accuracy, "hinges": hinges})
    return rows


def ranker_accuracy(world: TabularLoop, done: Iteration) -> float:
    """Share of right pairs in the black box's rankings of an iteration."""
    quality = [[world.known[x.prompt][int(r)] for r in x.responses] for x in done.interactions]
    return right_pairs(quality, [x.black_box or () for x in done.interactions])


def exact(noise: float) -> float:
    """Probability that a ranker with this noise orders a pair rightly, quality N(0, 1)."""
    return 0.5 + math.atan(1 / noise) / math.pi


def report_orders(run: Run, rows: list[dict[str, Any]]) -> None:
    """What agreement is worth: table and thresholds."""

    def column(name: str, n: int) -> np.ndarray:
        return np.array([r[name] for r in rows if r["n"] == n])

    run.section(
        "Orders on which two rankers agree",
        f"The black box sees quality with noise {BLACK}, the model with noise {WHITE}. Their longest common order has more of its pairs right "
        "than either. With a ranking by chance in the model's place the common order is no better than the black box's own: agreement "
        "helps where the model knows something.",
    )
    run.table("Share of rightly ordered pairs", [{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows])
    for n in LENGTHS:
        gain, control = column("agreement", n) - column("black box", n), column("with chance", n) - column("black box", n)
        run.check(f"n = {n}: agreement at least .06 above the black box", bool((gain >= 0.06).all()), _list(gain))
        run.check(f"n = {n}: agreement with a ranking by chance below the black box, on average", bool(control.mean() < 0), _list(control))
        off = np.array([column(name, n) - exact(noise) for name, noise in (("black box", BLACK), ("white box", WHITE))])
        run.check(f"n = {n}: both rankers within .01 of 1/2 + atan(1/noise)/pi", bool((np.abs(off.mean(1)) <= 0.01).all()), "; ".join(map(_list, off)))
    null = column("length with chance", 4) - chance_agreement(4)
    run.check("n = 4: mean length with a ranking by chance within .05 of 58/24", bool((np.abs(null) <= 0.05).all()), _list(null))
    run.headline("pairs right: agreement, black box", f"{column('agreement', 4).mean():.3f}, {column('black box', 4).mean():.3f}", "n = 4")


def report_loops(run: Run, rows: list[dict[str, Any]]) -> None:
    """What the loop makes of them: table, figure and thresholds."""

    def of(arm: str, name: str = "quality") -> np.ndarray:
        return np.array([r[name] for r in rows if r["arm"] == arm])

    agreed, distilled = (of(f"{target}, dynamic")[:, -1] - of(f"{target}, static")[:, -1] for target in ("agreement", "black box"))
    rise = of("agreement, dynamic", "accuracy")[:, -1] - of("agreement, dynamic", "accuracy")[:, 0]
    run.section(
        "The loop",
        "The black box gets less noisy as the demonstrations it is shown get better; the two static ones have half of their pairs right. "
        f"With dynamic ones its share of right pairs rises by {rise.mean():.3f}. That is worth {agreed.mean():+.3f} of expected quality where the "
        f"model learns from agreement, and {distilled.mean():+.3f} where it learns the black box's whole order. Shuffled labels make it worse "
        "than it was.",
    )
    run.table(
        "Expected quality after each iteration",
        [{"arm": arm} | {str(t): f"{v:.3f}" for t, v in enumerate(of(arm).mean(0))} for arm in ARMS],
        note=f"Means of {len(agreed)} worlds; 0 is before the first iteration.",
    )
    run.table(
        "Share of right pairs of the black box",
        [{"arm": arm} | {str(t): f"{v:.3f}" for t, v in enumerate(of(arm, "accuracy").mean(0), 1)} for arm in ARMS],
    )
    figure(run, {arm: of(arm).mean(0) for arm in ARMS})
    for arm in list(ARMS)[:4]:
        steps = np.diff(of(arm).mean(0)[:4])
        run.check(f"{arm}: quality rises in each of the first 3 iterations", bool((steps > 0).all()), _list(steps))
    error = float(agreed.std(ddof=1) / math.sqrt(len(agreed)))
    run.check("agreement: dynamic - static at least 2 standard errors", bool(agreed.mean() >= 2 * error), f"{agreed.mean():.4f} +- {error:.4f}: {_list(agreed)}")
    run.check("black box: dynamic - static at least .04", bool(distilled.mean() >= 0.04), f"{distilled.mean():.4f}: {_list(distilled)}")
    run.check("agreement, dynamic: the ranker's share of right pairs rises by .015", bool(rise.mean() >= 0.015), f"{rise.mean():.4f}: {_list(rise)}")
    shuffled = of("agreement, shuffled").mean(0)
    run.check("agreement, shuffled: quality ends below its start", bool(shuffled[-1] < shuffled[0]), _list(shuffled))
    hinges = np.concatenate([of(f"agreement, {kind}", "hinges").flatten() for kind in ("dynamic", "static", "shuffled")])
    run.check("agreement: no hinge of RRHF is above zero when its label is made", bool((hinges == 0).all()), f"largest share {hinges.max():.4f}")
    run.headline("dynamic - static, agreement", f"{agreed.mean():+.3f}", f"standard error {error:.3f}")
    run.headline("dynamic - static, black box", f"{distilled.mean():+.3f}")


def figure(run: Run, curves: dict[str, np.ndarray]) -> None:
    """Expected quality over iterations."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 3.8), layout="constrained")
    axis = drawn.subplots()
    for (arm, values), style in zip(curves.items(), ("-", "--", "-", "--", ":"), strict=True):
        axis.plot(values, style, marker="o", markersize=3, label=arm)
    axis.set(xlabel="iteration", ylabel="expected quality")
    axis.legend(frameon=False, fontsize=8)
    run.figure("expected quality", drawn, "Mean expected quality of a response over the worlds, by what the model learns from and what the ranker is shown.")


def _list(values: Any) -> str:
    return ", ".join(f"{v:.3f}" for v in values)
