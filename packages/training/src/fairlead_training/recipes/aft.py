"""`fairlead run aft`: right chains of thought above wrong ones, and what becomes of the wrong ones' language.

AFT (arXiv 2309.02144) on two toys in which a chain is two tokens. Sums modulo 7: what the constraints of AFT save. Noisy
references: what sampled chains add to fine-tuning. The losses are the objectives `aft` and `rrhf`.

Shapes: Q questions, D inputs, C answers, M sampled chains, S chains with the references.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.runs import Run

from ..chains import assessment_accuracy

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "vft": ("aft", {"align_weight": 0.0}),
    "plain": ("aft", {"variant": "plain"}),
    "detached": ("aft", {"variant": "detached"}),
    "boundary": ("aft", {"variant": "boundary", "boundary_beta": 0.15}),
    "rrhf": ("rrhf", {"sft_weight": 0.0}),
}


class AftConfig(MethodConfig):
    """Sizes; the defaults finish in under a minute on one core."""

    sums_seeds: int = Field(4, ge=1, description="models of the sums, seeded 4 seed, 4 seed + 1, ... by default")
    noisy_seeds: int = Field(3, ge=1, description="worlds with noisy references, seeded 3 seed, 3 seed + 1, ... by default")
    chains: int = Field(8, ge=1, description="chains sampled for each question")
    learning_rate: float = Field(3e-3, gt=0, description="learning rate of Adam, full batch")
    width: int = Field(96, ge=1, description="sums: units of each of two hidden layers")
    sums_prompts: int = Field(250, ge=2, le=343, description="sums: training questions")
    sums_vft_steps: int = Field(30, ge=1, description="sums: steps of fine-tuning before the chains are sampled")
    sums_steps: int = Field(30, ge=1, description="sums: steps with each loss")
    noisy_width: int = Field(64, ge=1, description="noisy references: units of the hidden layer")
    noisy_prompts: int = Field(400, ge=2, description="noisy references: training questions")
    noisy_test: int = Field(2000, ge=1, description="noisy references: new questions")
    noisy_share: float = Field(0.3, ge=0, le=1, description="noisy references: share of reference chains whose tokens are random")
    noisy_vft_steps: int = Field(40, ge=1, description="noisy references: steps of fine-tuning before the chains are sampled")
    noisy_steps: int = Field(100, ge=1, description="noisy references: steps with each loss")


class Toy(NamedTuple):
    """Questions x [Q, D], right answers [Q], reference chains [Q, 2], number of tokens; new questions and their answers."""

    x_QD: torch.Tensor
    gold_Q: torch.Tensor
    reference_Q2: torch.Tensor
    tokens: int
    new_x: torch.Tensor
    new_gold: torch.Tensor


class Aft(Recipe):
    """AFT with and without its constraints, beside fine-tuning and RRHF, on two toys."""

    Config = AftConfig
    config: AftConfig

    def __call__(self, run: Run) -> None:
        run.describe("Alignment fine-tuning", "Right chains above wrong ones: what the constraint saves, what sampled chains add.", "2309.02144")
        rows: dict[str, list[dict[str, Any]]] = {"sums": [], "noisy": []}
        for task, count in (("sums", self.config.sums_seeds), ("noisy", self.config.noisy_seeds)):
            for index in range(count):
                run.progress(f"training, {task}", index, count)
                rows[task] += run.stage(f"{task}-{index}", partial(compare, self.config, task, run.seed * count + index))
        report(run, rows["sums"], rows["noisy"])


def compare(config: AftConfig, task: str, seed: int) -> list[dict[str, Any]]:
    """One model, fine-tuned briefly, and what each loss makes of it."""
    g = torch.Generator().manual_seed(seed)
    toy = sums(config, g) if task == "sums" else noisy(config, g)
    layers, width = (2, config.width) if task == "sums" else (1, config.noisy_width)
    first, then = (config.sums_vft_steps, config.sums_steps) if task == "sums" else (config.noisy_vft_steps, config.noisy_steps)
    torch.manual_seed(seed)
    model = network(toy.x_QD.shape[1] + toy.tokens + 1, width, layers, toy.tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    train(model, optimizer, toy, torch.zeros(0, 3, dtype=torch.int64), "vft", first)
    chains = sample_chains(model, toy, config.chains, g)
    rows = [measure(model, toy, chains) | {"task": task, "seed": seed, "loss": "before"}]
    for name in LOSSES:
        one = copy.deepcopy(model)
        goes_on = torch.optim.Adam(one.parameters(), lr=config.learning_rate)
        goes_on.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(one, goes_on, toy, chains, name, then)
        rows.append(measure(one, toy, chains) | {"task": task, "seed": seed, "loss": name})
    return rows


def sums(config: AftConfig, g: torch.Generator) -> Toy:
    """(a, b, c) -> (a + b, a + b + c) modulo 7; the new questions are those that are left."""
    abc = torch.cartesian_prod(*[torch.arange(7)] * 3)[torch.randperm(343, generator=g)]
    x = torch.nn.functional.one_hot(abc, 7).flatten(1).float()
    chain = torch.stack([(abc[:, 0] + abc[:, 1]) % 7, abc.sum(1) % 7], 1)
    n = config.sums_prompts
    return Toy(x[:n], chain[:n, 1], chain[:n], 7, x[n:], chain[n:, 1])


def noisy(config: AftConfig, g: torch.Generator) -> Toy:
    """s1 = argmax(x W1), s2 = argmax((x + E[s1]) W2) over 8; some reference chains are random, the answers stay right."""
    x = torch.randn(config.noisy_prompts + config.noisy_test, 16, generator=g)
    w1, w2, e = (torch.randn(*shape, generator=g) for shape in ((16, 8), (16, 8), (8, 16)))
    s1 = (x @ w1).argmax(1)
    s2 = ((x + 2 * e[s1]) @ w2).argmax(1)
    n = config.noisy_prompts
    reference = torch.stack([s1, s2], 1)[:n].clone()
    replaced = torch.randperm(n, generator=g)[: round(config.noisy_share * n)]
    reference[replaced] = torch.randint(8, (len(replaced), 2), generator=g)
    return Toy(x[:n], s2[:n], reference, 8, x[n:], s2[n:])


def network(inputs: int, width: int, layers: int, outputs: int) -> torch.nn.Sequential:
    """An MLP of ReLUs."""
    sizes = [inputs] + [width] * layers
    parts = [part for a, b in pairwise(sizes) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    return torch.nn.Sequential(*parts, torch.nn.Linear(width, outputs))


def log_probs(model: torch.nn.Module, x: torch.Tensor, before: torch.Tensor, tokens: int) -> torch.Tensor:
    """Log-probabilities [N, C] of the next token after questions x [N, D] and the token before [N] (`tokens`: none yet)."""
    logits: torch.Tensor = model(torch.cat([x, torch.nn.functional.one_hot(before, tokens + 1).to(x.dtype)], 1))
    return logits.log_softmax(-1)


def chain_logp(model: torch.nn.Module, toy: Toy, question_S: torch.Tensor, chain_S2: torch.Tensor) -> torch.Tensor:
    """Log-probability of chains, [S]."""
    x = toy.x_QD[question_S]
    first = log_probs(model, x, torch.full_like(question_S, toy.tokens), toy.tokens).gather(1, chain_S2[:, :1])
    return (first + log_probs(model, x, chain_S2[:, 0], toy.tokens).gather(1, chain_S2[:, 1:])).squeeze(1)


@torch.no_grad()
def sample_chains(model: torch.nn.Module, toy: Toy, k: int, g: torch.Generator) -> torch.Tensor:
    """Different chains among k of each question: (question, first token, second token) [M, 3]."""
    question = torch.arange(len(toy.x_QD)).repeat_interleave(k)

    def draw(before: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(log_probs(model, toy.x_QD[question], before, toy.tokens).exp(), 1, generator=g).squeeze(1)

    first = draw(torch.full_like(question, toy.tokens))
    found: torch.Tensor = torch.unique(torch.stack([question, first, draw(first)], 1), dim=0)
    return found


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, toy: Toy, chains_M3: torch.Tensor, name: str, steps: int) -> None:
    """Full-batch steps on the references' likelihood and a loss of the chains, means over all questions."""
    objective, vft = registry.create("objective", LOSSES[name][0], **LOSSES[name][1]), registry.create("objective", "aft", align_weight=0.0)
    q = len(toy.x_QD)
    question = torch.cat([torch.arange(q), chains_M3[:, 0]])
    chain = torch.cat([toy.reference_Q2, chains_M3[:, 1:]])
    reference = torch.arange(len(question)) < q
    right = chain[:, 1] == toy.gold_Q[question]
    for _ in range(steps):
        logp = chain_logp(model, toy, question, chain)
        batch = SequenceStats(logp, torch.full_like(question, 2), group=question, role=right, extra={"reference": reference})
        optimizer.zero_grad()
        if LOSSES[name][0] == "aft":
            objective(batch).loss.backward()
        else:  # an objective of lists alone: its questions with one chain drop out, and count as 0
            lists = SequenceStats(logp[q:], batch.length[q:], group=question[q:], role=right[q:])
            (vft(batch).loss + objective(lists).per_item.sum() / q).backward()
        optimizer.step()


@torch.no_grad()
def measure(model: torch.nn.Module, toy: Toy, chains_M3: torch.Tensor) -> dict[str, Any]:
    """Assessment accuracy on the sampled chains, their mean scores, and greedy accuracy on both sets of questions."""

    def greedy(x: torch.Tensor, gold: torch.Tensor) -> float:
        s1 = log_probs(model, x, torch.full((len(x),), toy.tokens), toy.tokens).argmax(1)
        return float((log_probs(model, x, s1, toy.tokens).argmax(1) == gold).float().mean())

    question, chain = chains_M3[:, 0], chains_M3[:, 1:]
    s, right = chain_logp(model, toy, question, chain) / 2, chain[:, 1] == toy.gold_Q[question]
    return {
        "assessment": assessment_accuracy(s, right, question), "accuracy": greedy(toy.x_QD, toy.gold_Q),
        "new": greedy(toy.new_x, toy.new_gold), "right_score": float(s[right].mean()), "wrong_score": float(s[~right].mean()),
    }  # fmt: skip


def report(run: Run, sums_rows: list[dict[str, Any]], noisy_rows: list[dict[str, Any]]) -> None:
    """Tables, a figure and thresholds."""

    def column(rows: list[dict[str, Any]], loss: str, name: str) -> np.ndarray:
        return np.array([r[name] for r in rows if r["loss"] == loss])

    for row in sums_rows + noisy_rows:
        for name in ("assessment", "accuracy", "new"):
            run.metric(name, row[name], **{k: row[k] for k in ("task", "seed", "loss")})
    a, accuracy = partial(column, sums_rows, name="assessment"), partial(column, sums_rows, name="accuracy")
    new = partial(column, noisy_rows, name="new")
    wrong = {loss: column(sums_rows, loss, "wrong_score").mean() for loss in LOSSES}
    run.section(
        "What the constraint saves",
        "Sums modulo 7, questions of training. Every loss on chains raises the assessment accuracy and costs greedy answers, which fine-tuning "
        "alone gets right. The constraint of AFT saves a part of them: wrong chains end at "
        f"{wrong['plain']:.2f} nats a token without it, at {wrong['detached']:.2f} detached and {wrong['boundary']:.2f} with the boundary. RRHF sums "
        "its hinges over all pairs of a question, which outweigh the likelihood of its reference chain.",
    )  # fmt: skip
    figure(run, sums_rows)
    run.table("Sums modulo 7", [_summary(sums_rows, loss) for loss in ("before", *LOSSES)], note="Means, least to largest over models. Scores are nats a token.")
    run.section(
        "What sampled chains add",
        "Some reference chains are random; the sampled chains are judged by the right answers all the same. On new questions AFT with "
        f"detached wrong chains gains {(new('detached') - new('vft')).mean():+.3f} over fine-tuning.",
    )  # fmt: skip
    run.table("Noisy references", [_summary(noisy_rows, loss) for loss in ("before", *LOSSES)], note="Means, least to largest over worlds. Scores are nats a token.")
    for name in ("detached", "boundary"):
        gain = a(name).mean() - a("vft").mean()
        run.check(f"{name}: assessment accuracy at least .15 above fine-tuning", bool(gain >= 0.15), f"{gain:+.4f}")
        for other, least in (("rrhf", 0.15), ("plain", 0.01)):
            gain = accuracy(name).mean() - accuracy(other).mean()
            run.check(f"{name}: greedy accuracy at least {least:g} above {other}", bool(gain >= least), f"{gain:+.4f}")
    for name in ("boundary", "detached"):
        gains = new(name) - new("vft")
        run.check(f"{name}: on new questions at least .02 above fine-tuning on noisy references", bool(gains.mean() >= 0.02), f"{gains.mean():+.4f}")
    run.check("detached above fine-tuning on noisy references in every world", bool((gains > 0).all()), f"smallest {gains.min():+.4f}")
    run.headline("assessment accuracy, detached", f"{a('detached').mean():.3f}", f"fine-tuning alone {a('vft').mean():.3f}")
    run.headline("greedy accuracy, detached", f"{accuracy('detached').mean():.3f}", f"rrhf {accuracy('rrhf').mean():.3f}, plain {accuracy('plain').mean():.3f}")
    run.headline("gain on new questions, noisy references", f"{gains.mean():+.3f}", f"{gains.min():+.3f} to {gains.max():+.3f}")


def figure(run: Run, rows: list[dict[str, Any]]) -> None:
    """Assessment accuracy against greedy accuracy, a mark for each model."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.5, 4), layout="constrained")
    axis = drawn.subplots()
    for loss, marker in zip(LOSSES, "osDv^", strict=True):
        points = [(r["assessment"], r["accuracy"]) for r in rows if r["loss"] == loss]
        axis.scatter(*zip(*points, strict=True), label=loss, marker=marker, alpha=0.7)
    axis.set(xlabel="assessment accuracy", ylabel="greedy accuracy")
    axis.legend(frameon=False, fontsize=8)
    run.figure("assessment-accuracy", drawn, "Sums modulo 7, training questions: assessment accuracy against greedy accuracy of every model.")


def _summary(rows: list[dict[str, Any]], loss: str) -> dict[str, str]:
    names = {
        "assessment": "assessment accuracy", "accuracy": "greedy, training", "new": "greedy, new questions",
        "right_score": "score of right chains", "wrong_score": "score of wrong chains",
    }  # fmt: skip
    found = {title: np.array([r[name] for r in rows if r["loss"] == loss]) for name, title in names.items()}
    return {"loss": loss} | {title: f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})" for title, v in found.items()}
