"""`fairlead run transfer-q-star`: decoding with the values of an aligned model, against values of the model itself.

Chakraborty et al., "Transfer Q Star" (arXiv 2405.20495). Part one is exact: random trees of answers, every value a sum, and
methods compared at the divergence that they spend. Part two decodes from small language models whose answers can be listed:
a baseline model is trained towards the exact tilt, and the registered decoders use it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field

from fairlead import stats
from fairlead.config import MethodConfig
from fairlead.kinds import Decoder, Recipe
from fairlead.runs import Run

from .. import theory
from ..args_search import ARGS
from ..controlled_decoding import ControlledDecoding
from ..enumerable import all_answers, answer_logprobs, tiny_llama, trainable_answer_logprobs
from ..transfer_q_star import TransferQStar
from . import trees

GREEDY = "greedy"
METHODS = (GREEDY, "args", "controlled decoding", "transfer-q* (sft)", "transfer-q* (aligned)")


class TransferQStarRecipeConfig(MethodConfig):
    """Sizes of both parts; the defaults finish within three minutes on one core."""

    trees: int = Field(60, ge=10, description="random trees of the exact part")
    bound_trees: int = Field(200, ge=10, description="random trees on which the paper's bounds are tried")
    models: int = Field(16, ge=3, description="language models of the second part")
    prompts: int = Field(64, ge=4, description="prompts for each language model")
    steps: int = Field(150, ge=1, description="training steps of each aligned model")
    rollouts: int = Field(4, ge=1, description="continuations of each candidate")
    alpha: float = Field(0.1, gt=0, description="alpha of every guided decoder of the second part")
    beta: float = Field(0.3, gt=0, description="KL weight of the tilt that the aligned model is trained towards")


class TransferQStarRecipe(Recipe):
    """Equal-divergence comparison on exact trees; ARGS, controlled decoding and Transfer Q* on language models."""

    Config = TransferQStarRecipeConfig
    config: TransferQStarRecipeConfig

    def __call__(self, run: Run) -> None:
        c = self.config
        cells = [
            run.stage(f"trees-{alpha:g}", partial(compare_on_trees, run.seed, c.trees, alpha, 0.3)) for alpha in (0.3, 0.1)
        ]
        bounds = run.stage("bounds", partial(try_bounds, run.seed, c.bound_trees))
        frontier = run.stage("frontier", partial(sweep, run.seed))
        rows = []
        for index in range(c.models):
            run.progress("language models", index, c.models)
            rows.append(run.stage(f"model-{index}", partial(measure_model, c, 1000 * run.seed + index)))
        trees_section(run, cells, bounds, frontier)
        models_section(run, rows, c)


def compare_on_trees(seed: int, count: int, alpha: float, beta: float) -> dict[str, list[float]]:
    """Reward and divergence of each method, and rewards at equal divergence, one value per tree."""
    found: dict[str, list[float]] = {}

    def keep(name: str, policy: trees.Policy, tree: trees.Tree) -> float:
        found.setdefault(f"reward {name}", []).append(trees.expected(policy, tree.reward))
        found.setdefault(f"kl {name}", []).append(trees.divergence(policy, tree.sft))
        return found[f"kl {name}"][-1]

    for index in range(count):
        tree = trees.random_tree(np.random.default_rng([seed, index]))
        aligned = trees.tilted(tree.sft, tree.reward, beta)
        other = trees.tilted(tree.sft, tree.baseline, beta)
        own, star = trees.action_values(tree.sft, tree.reward), trees.action_values(aligned, tree.reward)
        keep("sft", tree.sft, tree)
        keep("aligned", aligned, tree)
        keep("cd", trees.guided(tree.sft, own, alpha), tree)
        kl_sft = keep("tq sft", trees.guided(tree.sft, star, alpha), tree)
        kl_aligned = keep("tq aligned", trees.guided(aligned, star, alpha), tree)
        keep("tq indirect", trees.guided(other, trees.weighted_values(other, tree.reward, tree.baseline, beta), alpha), tree)
        keep("tq no weights", trees.guided(other, trees.action_values(other, tree.reward), alpha), tree)
        for name, kl in (("sft", kl_sft), ("aligned", kl_aligned)):
            equal = trees.at_divergence(tree.sft, own, tree.sft, kl)
            found.setdefault(f"gain {name}", []).append(found[f"reward tq {name}"][-1] - trees.expected(equal, tree.reward))
        best = theory.tilt(np.log(trees.joint(tree.sft)), tree.reward, theory.solve_alpha(np.log(trees.joint(tree.sft)), tree.reward, kl_aligned))
        found.setdefault("ceiling", []).append(float(np.exp(best) @ tree.reward) - found["reward tq aligned"][-1])
    return found


def try_bounds(seed: int, count: int) -> dict[str, float]:
    """Smallest slack of the paper's three bounds over trees and settings; negative where one is violated."""
    slack = {"improvement": np.inf, "suboptimality": np.inf, "distance": np.inf}
    for index in range(count):
        tree = trees.random_tree(np.random.default_rng([seed, 1, index]))
        for alpha, beta in ((0.3, 0.3), (0.1, 0.3), (0.05, 0.05), (1.0, 1.0)):
            aligned = trees.tilted(tree.sft, tree.reward, beta)
            policy = trees.guided(aligned, trees.action_values(aligned, tree.reward), alpha)
            h = trees.stepwise_divergence(policy, aligned)
            reward = trees.expected(policy, tree.reward)
            best = int(tree.reward.argmax())
            slack["improvement"] = min(slack["improvement"], reward - trees.expected(aligned, tree.reward) - alpha * h)
            top = -beta * float(np.log(trees.joint(tree.sft)[best])) - alpha * h
            slack["suboptimality"] = min(slack["suboptimality"], top - (float(tree.reward[best]) - reward))
            limit = (1 / beta + len(tree.sft) / alpha) * 1.0
            slack["distance"] = min(slack["distance"], limit - trees.divergence(policy, tree.sft))
    return {name: float(value) for name, value in slack.items()}


def sweep(seed: int, count: int = 20, beta: float = 0.3) -> dict[str, list[list[float]]]:
    """(KL, reward) of each method over alpha, and of the tilt over beta, means over trees."""
    alphas = [10.0, 3.0, 1.0, 0.5, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05]
    curves: dict[str, np.ndarray] = {name: np.zeros((len(alphas), 2)) for name in ("tilt", "cd", "tq sft", "tq aligned")}
    for index in range(count):
        tree = trees.random_tree(np.random.default_rng([seed, 2, index]))
        aligned = trees.tilted(tree.sft, tree.reward, beta)
        own, star = trees.action_values(tree.sft, tree.reward), trees.action_values(aligned, tree.reward)
        for i, alpha in enumerate(alphas):
            for name, policy in (
                ("tilt", trees.tilted(tree.sft, tree.reward, alpha)), ("cd", trees.guided(tree.sft, own, alpha)),
                ("tq sft", trees.guided(tree.sft, star, alpha)), ("tq aligned", trees.guided(aligned, star, alpha)),
            ):  # fmt: skip
                curves[name][i] += np.array([trees.divergence(policy, tree.sft), trees.expected(policy, tree.reward)]) / count
    return {name: curve.tolist() for name, curve in curves.items()}


class PairReward:
    """r = .5 + sum over neighbouring tokens (the prompt's last included) of a table per position, N(0, 1) / (4 sqrt 10). On a
    prefix, the pairs that are there."""

    def __init__(self, vocab: int, length: int, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.tables_LVV = torch.randn(length, vocab + 1, vocab + 1, generator=noise, dtype=torch.float64) / (4 * 10**0.5)

    def exact(self, prompt: torch.Tensor, answers_ML: torch.Tensor) -> torch.Tensor:
        """float64 [M]."""
        before = torch.cat([prompt[-1:].expand(len(answers_ML), 1), answers_ML[:, :-1]], 1)
        places = torch.arange(answers_ML.shape[1])
        return 0.5 + self.tables_LVV[places, before, answers_ML].sum(1)

    def __call__(self, prompts: Any, responses: Any) -> list[float]:
        return [float(self.exact(p, r[None])[0]) for p, r in zip(prompts, responses, strict=True)]


def measure_model(c: TransferQStarRecipeConfig, seed: int, vocab: int = 5, length: int = 4) -> dict[str, Any]:
    """Mean rewards of the methods on one language model, and what its aligned companion reaches."""
    sft = tiny_llama(vocab, head_scale=15.0, seed=seed, bos=False)
    reward = PairReward(vocab, length, seed)
    noise = torch.Generator().manual_seed(seed + 1)
    prompts = [torch.randint(0, vocab, (3,), generator=noise) for _ in range(c.prompts)]
    answers = all_answers(vocab, length)
    distinct = list({tuple(p.tolist()): p for p in prompts}.values())
    aligned = align(sft, reward, distinct, answers, c.beta, c.steps, seed)
    row: dict[str, Any] = {"seed": seed}
    laws = [(answer_logprobs(sft, p, answers).numpy(), reward.exact(p, answers).numpy()) for p in distinct]
    row["expected sft"] = float(np.mean([np.exp(lp) @ r for lp, r in laws]))
    row["expected tilt"] = float(np.mean([np.exp(theory.tilt(lp, r, 1 / c.beta)) @ r for lp, r in laws]))
    row["expected aligned"] = float(
        np.mean([np.exp(answer_logprobs(aligned, p, answers).numpy()) @ r for p, (_, r) in zip(distinct, laws, strict=True)])
    )
    guide = {"alpha": c.alpha, "top_k": vocab, "rollouts": c.rollouts, "horizon": length}
    decoders: dict[str, tuple[Decoder, Any]] = {
        GREEDY: (TransferQStar(alpha=float("inf"), top_k=vocab), sft),
        "args": (ARGS(w=1 / c.alpha, top_k=vocab), sft),
        "controlled decoding": (ControlledDecoding(**guide), sft),
        "transfer-q* (sft)": (TransferQStar(**guide, rollout=aligned), sft),
        "transfer-q* (aligned)": (TransferQStar(**guide, rollout=aligned), aligned),
    }
    for name, (decoder, proposal) in decoders.items():
        made = decoder.generate(proposal, None, prompts, reward=reward, max_new_tokens=length, seed=seed, batch_size=8192)
        row[name] = float(np.mean([g.reward for g in made.generations]))
        row[f"{name} tokens"] = made.cost.model_tokens / len(prompts)
        row[f"{name} seconds"] = made.cost.seconds / len(prompts)
        row[f"{name} calls"] = made.cost.reward_calls / len(prompts)
    return row


class Exact(Protocol):
    """A reward that is exact for many answers to one prompt."""

    def exact(self, prompt: torch.Tensor, answers_ML: torch.Tensor) -> torch.Tensor:
        """float64 [M]."""
        ...


def align(sft: Any, reward: Exact, prompts: list[torch.Tensor], answers: torch.Tensor, beta: float, steps: int, seed: int) -> Any:
    """A copy of the model trained by cross-entropy towards the exact tilt at beta: `steps` Adam steps of four prompts."""
    import copy

    model = copy.deepcopy(sft)
    targets = [
        (torch.from_numpy(np.asarray(theory.tilt(answer_logprobs(sft, p, answers).numpy(), reward.exact(p, answers).numpy(), 1 / beta)))).exp()
        for p in prompts
    ]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed + 2)
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for i in torch.randperm(len(prompts), generator=order)[:4].tolist():
            loss = loss - (targets[i] * trainable_answer_logprobs(model, prompts[i], answers)).sum() / 4
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def trees_section(run: Run, cells: list[dict[str, list[float]]], bounds: dict[str, float], frontier: dict[str, list[list[float]]]) -> None:
    """The exact part: figure, table, thresholds."""
    run.section(
        "Exact values, equal divergence",
        "On random trees of four steps with four tokens each, every expectation is a sum. At one alpha a method that starts from "
        "the aligned model also strays further from the reference, so rewards are compared at equal divergence: controlled "
        "decoding gets the alpha that spends what Transfer Q* spends.\n\n"
        "The tilted distribution is the most that any divergence can buy. Transfer Q* with the aligned model as proposal comes "
        "close to it; values of the reference's own continuations fall behind as guidance gets stronger.",
    )
    run.figure("frontier", _frontier_figure(frontier), "Expected reward against divergence from the reference, mean over 20 trees; points are settings of alpha.")
    rows = []
    for alpha, cell in zip((0.3, 0.1), cells, strict=True):
        for name, key in (
            ("reference", "sft"), ("aligned model (beta .3)", "aligned"), ("controlled decoding", "cd"), ("Transfer Q*, proposal reference", "tq sft"),
            ("Transfer Q*, proposal aligned", "tq aligned"), ("Transfer Q*, indirect", "tq indirect"), ("the same without weights", "tq no weights"),
        ):  # fmt: skip
            rows.append({"alpha": alpha, "method": name, "reward": str(stats.mean(cell[f"reward {key}"])), "KL to the reference, nats": f"{np.mean(cell[f'kl {key}']):.3f}"})
    run.table("Rewards at one alpha", rows, note=f"{len(cells[0]['ceiling'])} trees, 95 % intervals.")
    for alpha, cell, least in ((0.3, cells[0], 0.015), (0.1, cells[1], 0.025)):
        gain, share = np.array(cell["gain aligned"]), float(np.mean(np.array(cell["gain aligned"]) > 0))
        run.metric("gain_at_equal_kl", float(gain.mean()), alpha=alpha)
        run.check(
            f"alpha {alpha:g}: Transfer Q* (aligned proposal) beats controlled decoding at equal divergence", bool(gain.mean() > least and share >= 0.95),
            f"gain {gain.mean():.4f} ± {stats.standard_error(gain):.4f} s.e. (above {least}), above 0 on {share:.0%} of trees (at least 95 %)",
        )  # fmt: skip
        run.check(
            f"alpha {alpha:g}: nothing lies above the tilt", min(cell["ceiling"]) >= -1e-9,
            f"the tilt at that divergence earns {np.mean(cell['ceiling']):.4f} more on average, never less than {min(cell['ceiling']):.1e}",
        )  # fmt: skip
    difference = np.array(cells[1]["reward tq sft"]) - np.array(cells[1]["reward cd"])
    run.check(
        "alpha 0.1: values of the aligned model help from the reference's own proposal", bool(0.03 <= difference.mean() <= 0.045),
        f"Transfer Q* minus controlled decoding {difference.mean():.4f} ± {stats.standard_error(difference):.4f} s.e. (published .03 to .045)",
    )  # fmt: skip
    run.check(
        "the paper's three bounds hold", min(bounds.values()) >= -1e-9,
        ", ".join(f"{name}: least slack {value:.2e}" for name, value in bounds.items()),
    )  # fmt: skip
    run.headline("gain at equal divergence", f"{np.mean(cells[1]['gain aligned']):+.3f}", "reward in [0, 1], alpha .1, against controlled decoding")


def models_section(run: Run, rows: list[dict[str, Any]], c: TransferQStarRecipeConfig) -> None:
    """The language models: table, thresholds, cost."""
    from scipy import stats as tests

    values = {name: np.array([row[name] for row in rows]) for name in METHODS}
    covered = np.array([(r["expected aligned"] - r["expected sft"]) / (r["expected tilt"] - r["expected sft"]) for r in rows])
    run.section(
        "Language models",
        f"{len(rows)} random language models of five tokens, answers of four, {c.prompts} prompts each; the registered decoders, alpha {c.alpha:g}, "
        f"{c.rollouts} sampled continuations of each candidate. The aligned model was trained for {c.steps} steps towards the exact tilt "
        f"and covers {covered.mean():.0%} of what that tilt gains (from {covered.min():.0%} to {covered.max():.0%}).\n\n"
        "The model is the unit: the prompts of one model share its reward tables. What Transfer Q* is worth depends on the aligned model; "
        "one that covers little of the tilt's gain, or has collapsed, can fall below controlled decoding.",
    )
    run.figure("models", _models_figure(values), "Gain in mean reward over greedy decoding, one line per language model.")
    table = [
        {
            "method": name, "reward": str(stats.mean(values[name])), "over greedy": str(stats.mean(values[name] - values[GREEDY])) if name != GREEDY else "",
            "model tokens per prompt": f"{np.mean([r[f'{name} tokens'] for r in rows]):.0f}", "reward calls": f"{np.mean([r[f'{name} calls'] for r in rows]):.0f}",
            "seconds per prompt": f"{np.mean([r[f'{name} seconds'] for r in rows]):.4f}",
        }
        for name in METHODS
    ]  # fmt: skip
    table.append({"method": "E r of the reference, sampled", "reward": str(stats.mean([r["expected sft"] for r in rows]))})
    table.append({"method": "E r of the aligned model, sampled", "reward": str(stats.mean([r["expected aligned"] for r in rows]))})
    table.append({"method": f"E r of the exact tilt, beta {c.beta:g}", "reward": str(stats.mean([r["expected tilt"] for r in rows]))})
    columns = ["method", "reward", "over greedy", "model tokens per prompt", "reward calls", "seconds per prompt"]
    run.table("Rewards and cost", [{k: row.get(k, "") for k in columns} for row in table], columns)
    best = values["transfer-q* (aligned)"]
    for name in ("args", "controlled decoding"):
        p = float(tests.ttest_rel(best, values[name], alternative="greater").pvalue)
        run.metric(f"over_{name.replace(' ', '_')}", float((best - values[name]).mean()), p=p)
        run.check(f"Transfer Q* (aligned proposal) beats {name} over models", p < 0.01, f"{(best - values[name]).mean():+.3f}, one-sided paired t-test p = {p:.2g} (below .01)")
    gains = values["args"] - values[GREEDY]
    run.check("ARGS beats greedy decoding on every model", bool((gains > 0).all()), f"smallest gain {gains.min():+.3f}, mean {gains.mean():+.3f}")
    run.headline("over ARGS", f"{(best - values['args']).mean():+.3f}", f"mean reward, {len(rows)} language models")


def _frontier_figure(curves: dict[str, list[list[float]]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    looks = {"tilt": ("exact tilt (ceiling)", "k-"), "tq aligned": ("Transfer Q*, aligned proposal", "o-"), "tq sft": ("Transfer Q*, reference proposal", "s-"), "cd": ("controlled decoding", "^-")}
    for name, (label, style) in looks.items():
        kl, reward = np.array(curves[name]).T
        order = np.argsort(kl)
        axis.plot(kl[order], reward[order], style, label=label, markersize=4, linewidth=1.4)
    axis.set(xlabel="KL divergence from the reference, nats", ylabel="expected reward", xlim=(0, 2.5))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.tight_layout()
    plt.close(figure)
    return figure


def _models_figure(values: dict[str, np.ndarray]) -> Any:
    import matplotlib.pyplot as plt

    names = METHODS[1:]
    gains = np.stack([values[name] - values[GREEDY] for name in names], 1)
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    axis.plot(gains.T, color="0.75", linewidth=0.8)
    axis.plot(gains.mean(0), "o-", color="#22548c", linewidth=2, label="mean over models")
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="reward over greedy decoding")
    axis.grid(alpha=0.25, axis="y")
    axis.legend(frameon=False)
    figure.tight_layout()
    plt.close(figure)
    return figure
