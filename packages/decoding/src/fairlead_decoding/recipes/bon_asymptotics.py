"""`fairlead run bon-asymptotics`: best-of-n against the best that its KL divergence could buy.

Yang et al., "Asymptotics of Language Model Alignment" (arXiv 2404.01730), with the exact law, the bound and the estimator
of Beirami et al. (arXiv 2401.01879). Part one is the memoryless model at growing length, exact through types. Part two
is language models whose every answer is listed, where what samples say is held against what is true.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead.config import MethodConfig
from fairlead.generation import generate
from fairlead.kinds import Recipe
from fairlead.runs import Run

from .. import theory
from ..enumerable import RandomTokenReward, all_answers, answer_index, answer_logprobs, tiny_llama
from ..theory import plots

LETTERS_P, LETTERS_Q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
RESAMPLES = 400


class BonAsymptoticsConfig(MethodConfig):
    """Sizes of both parts; the defaults finish within a minute on one core."""

    delta: float = Field(0.1, gt=0, lt=1, description="KL budget per letter of the memoryless part, nats")
    lengths: tuple[int, ...] = Field((5, 10, 20, 40, 80, 160), min_length=2, description="answer lengths of the memoryless part, ascending")
    models: int = Field(3, ge=1, description="random language models, seeded 3 seed, 3 seed + 1, ... by default")
    vocab: int = Field(6, ge=2, description="tokens of a language model")
    length: int = Field(5, ge=1, description="tokens of an answer; vocab^length answers are listed")
    head_scale: float = Field(60.0, gt=0, description="factor on the output layer; larger is a more peaked model")
    samples: int = Field(4096, ge=64, description="answers drawn from each model")
    sizes: tuple[int, ...] = Field((2, 4, 8, 16), min_length=1, description="the n of best-of-n, ascending")


class BonAsymptotics(Recipe):
    """Convergence of best-of-exp(m delta) to the tilt; exact divergence against its bound, estimate and samples."""

    Config = BonAsymptoticsConfig
    config: BonAsymptoticsConfig

    def __call__(self, run: Run) -> None:
        lengths = [theory.LengthResult(**row) for row in run.stage("lengths", self._lengths)]
        cells: list[dict[str, Any]] = []
        problems: dict[str, tuple[Any, Any]] = {}
        for index in range(self.config.models):
            seed = run.seed * self.config.models + index
            run.progress("models", index, self.config.models)
            found = run.stage(f"model-{index}", partial(measure_model, self.config, seed))
            cells += found["cells"]
            problems[_title(seed, found["largest"])] = reference(self.config, seed)
        models_section(run, cells, problems, self.config)
        lengths_section(run, lengths, self.config.delta)

    def _lengths(self) -> list[dict[str, Any]]:
        from dataclasses import asdict

        return [asdict(theory.best_of_n_at_length(LETTERS_P, LETTERS_Q, m, self.config.delta)) for m in self.config.lengths]


def reference(config: BonAsymptoticsConfig, seed: int, positions: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """log-probability and reward of every answer of one model: float64 [M] each."""
    answers = all_answers(config.vocab, config.length)
    model = tiny_llama(config.vocab, head_scale=config.head_scale, seed=seed)
    reward = RandomTokenReward(vocab=config.vocab, positions=positions, seed=seed)
    return answer_logprobs(model, [config.vocab], answers).numpy(), np.round(reward.exact(answers).numpy(), 12)


def measure_model(config: BonAsymptoticsConfig, seed: int) -> dict[str, Any]:
    """Draw answers from one model; hold eq. 12, the bound and the estimate against the exact law, for two rewards."""
    model = tiny_llama(config.vocab, head_scale=config.head_scale, seed=seed)
    prompt = torch.tensor([config.vocab])
    drawn = generate(
        model, None, [prompt], n=config.samples, max_new_tokens=config.length, seed=seed, batch_size=config.samples
    )[0]
    index = answer_index(torch.stack([g.ids for g in drawn]), config.vocab).numpy()
    cells = []
    for positions, table in ((0, "shared"), (config.length, "by position")):
        log_p, r = reference(config, seed, positions)
        replicates = theory.best_of_n_replicates(r[index], config.sizes, RESAMPLES, seed)
        for place, n in enumerate(config.sizes):
            log_pi = theory.bon_log_pmf(log_p, r, n)
            kl = float(theory.bon_kl_exact(log_p, r, n))
            alpha = theory.solve_alpha(log_p, r, kl)
            phi = theory.tilt(log_p, r, alpha)
            sampled = float(theory.best_of_n_reward(r[index], n))
            low, high = np.quantile(replicates[:, place], [0.025, 0.975]).tolist()
            cells.append(
                {
                    "seed": seed, "table": table, "n": n, "largest": float(np.exp(log_p.max())), "kl": kl,
                    "estimate": float(np.exp(log_pi) @ theory.bon_kl_estimate(log_p, n)), "bound": theory.bon_kl_bound(n),
                    "reward": float(theory.expected(log_pi, r)), "sampled": sampled, "low": min(low, sampled),
                    "high": max(high, sampled), "se": max(float(replicates[:, place].std(ddof=1)), exact_error(log_p, r, n, len(index))),
                    "win": float(theory.bon_win_rate(log_p, r, n)), "tilt": float(theory.expected(phi, r)), "alpha": alpha,
                    "apart": float(theory.kl_divergence(log_pi, phi)),
                }
            )  # fmt: skip
    return {"largest": cells[0]["largest"], "cells": cells}


def exact_error(log_p: np.ndarray, r: np.ndarray, n: int, samples: int) -> float:
    """Standard error of eq. 12 to leading order, n sd(h) / sqrt(samples) with h(y) = E max(r(y), best of n - 1 others), from
    the exact law. The bootstrap knows only what was drawn: on a peaked model it may see no spread where a better answer is rare."""
    order = np.argsort(r, kind="stable")
    rewards, law = r[order], np.exp(log_p[order])
    if n == 1:
        return float(np.sqrt(law @ (rewards - law @ rewards) ** 2 / samples))
    others = np.exp(theory.bon_log_pmf(log_p, r, n - 1))[order]
    above = np.cumsum((others * rewards)[::-1])[::-1] - others * rewards
    h = np.cumsum(others) * rewards + above
    return n * float(np.sqrt(law @ (h - law @ h) ** 2 / samples))


def models_section(run: Run, cells: list[dict[str, Any]], problems: dict[str, tuple[Any, Any]], config: BonAsymptoticsConfig) -> None:
    """Exact, estimated and bounded divergence; sampled and exact reward; the distance from the tilt."""
    peaked = max(cells, key=lambda c: c["bound"] / c["kl"])
    run.section(
        "What best-of-n really costs",
        f"The formula log n − (n−1)/n is often reported as the KL divergence of best-of-n. It is only an upper bound, and on "
        f"peaked models it is far off: here, at n = {peaked['n']}, a model that gives one answer {peaked['largest']:.0%} of the "
        f"time diverges by {peaked['kl']:.3f} nats where the formula says {peaked['bound']:.3f}.\n\n"
        "The estimate needs the probability of the chosen answer alone, so it works for real models. It lies between the exact "
        "divergence and the bound. The expected reward of every n comes from one set of draws, without drawing again.\n\n"
        "The tilted distribution earns the most that a divergence can buy. Best-of-n earns less at the same divergence, and what is "
        "missing is exactly its divergence from the tilt divided by α.",
    )  # fmt: skip
    sizes = (1, *(n for n in config.sizes if n > 1))
    run.figure(
        "bon-kl", plots.bon_kl_figure(problems, sizes),
        f"Every answer of each model is listed ({config.vocab}^{config.length}), so the exact curve is exact. Reward: one weight per "
        "token, shared by all positions.",
    )  # fmt: skip
    widest = max((c for c in cells if c["table"] == "shared"), key=lambda c: c["kl"])["seed"]
    own = [c for c in cells if c["seed"] == widest and c["table"] == "shared"]
    figure = plots.reward_kl_figure(*problems[_title(widest, own[0]["largest"])], sizes=sizes)
    axis = figure.axes[0]
    axis.errorbar(
        [c["kl"] for c in own], [c["sampled"] for c in own], yerr=[[c["sampled"] - c["low"] for c in own], [c["high"] - c["sampled"] for c in own]],
        fmt="_", color=plots.GREEN, capsize=3, label=f"best-of-n from {config.samples} draws, 95 %",
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    run.figure("reward-kl", figure, f"Model {widest}: no policy lies above the blue line; best-of-n lies below it by KL(best-of-n || tilt) / α.")
    run.table(
        "Exact against sampled", [_row(c) for c in cells],
        note=f"{config.samples} draws per model; the interval of the sampled reward is a percentile bootstrap over draws, and the "
        "points of one model share their draws. Probability: of the model's likeliest answer. KL in nats, the estimate averaged "
        "exactly over best-of-n. Win rate: against one sample of the model.",
    )  # fmt: skip
    for cell in cells:
        run.metric("bon kl", cell["kl"], **{k: v for k, v in cell.items() if k != "kl"})
    scores = [(c["sampled"] - c["reward"]) / c["se"] if c["se"] > 0 else 0.0 for c in cells]
    worst = max(scores, key=abs)
    run.check(
        "reward from samples within 4 standard errors of the exact one, every model, reward and n", abs(worst) <= 4,
        f"largest |z| {abs(worst):.2f} in {len(cells)} cells",
    )  # fmt: skip
    tightest = min(c["bound"] - c["kl"] for c in cells)
    run.check(
        "exact KL strictly below log n − (n−1)/n", tightest > 0,
        f"smallest difference {tightest:.4f} nats in {len(cells)} cells; bound / exact up to {max(c['bound'] / c['kl'] for c in cells):.1f}",
    )  # fmt: skip
    nearer = sum(abs(c["estimate"] - c["kl"]) < abs(c["bound"] - c["kl"]) for c in cells)
    ratio = [abs(c["estimate"] - c["kl"]) / abs(c["bound"] - c["kl"]) for c in cells]
    run.check(
        "the estimate is closer to the exact KL than the bound, in every cell", nearer == len(cells),
        f"{nearer} of {len(cells)} cells; error of the estimate {min(ratio):.0%} to {max(ratio):.0%} of the bound's",
    )  # fmt: skip
    order = min(min(c["estimate"] - c["kl"], c["bound"] - c["estimate"]) for c in cells)
    run.check("the estimate lies between the exact KL and the bound", order > -1e-12, f"smallest difference {order:.1e} nats")
    slack = max(abs(c["apart"] - c["alpha"] * (c["tilt"] - c["reward"])) for c in cells)
    run.check(
        "what best-of-n lacks in reward is KL(best-of-n || tilt) / α", slack < 1e-9,
        f"largest difference {slack:.1e}; reward lacking {min(c['tilt'] - c['reward'] for c in cells):.4f} to {max(c['tilt'] - c['reward'] for c in cells):.4f}",
    )  # fmt: skip
    won = max(c["win"] - c["n"] / (c["n"] + 1) for c in cells)
    run.check("win rate at most n / (n+1)", won <= 1e-12, f"largest difference {won:+.4f}")
    run.headline("KL of best-of-n by the formula, over the exact one", f"{peaked['bound'] / peaked['kl']:.1f} times", f"n = {peaked['n']}, likeliest answer {peaked['largest']:.0%}")
    run.headline("error of the estimate", f"{np.median(ratio):.0%} of the bound's", f"median of {len(cells)} cells; {min(ratio):.0%} to {max(ratio):.0%}")
    run.headline("sampled against exact reward", f"|z| ≤ {abs(worst):.2f}", f"{len(cells)} cells, {config.samples} draws per model")


def _title(seed: int, largest: float) -> str:
    return f"model {seed}, p of the likeliest answer {largest:.2f}"


def _row(c: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": c["seed"], "probability": f"{c['largest']:.2f}", "weights": c["table"], "n": c["n"],
        "KL exact": f"{c['kl']:.3f}", "estimate": f"{c['estimate']:.3f}", "bound": f"{c['bound']:.3f}",
        "reward, exact": f"{c['reward']:+.3f}", "sampled, 95 %": f"{c['sampled']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]",
        "tilt, same KL": f"{c['tilt']:+.3f}", "win rate": f"{c['win']:.3f}",
    }  # fmt: skip


def lengths_section(run: Run, results: list[theory.LengthResult], delta: float) -> None:
    """Best-of-exp(m delta) becomes the tilt as answers grow; the rate function of both."""
    last, alpha = results[-1], results[0].alpha
    run.section(
        "Long answers: best-of-n becomes the tilt",
        f"Letters drawn one by one, reward the sum of their log q, and n = exp({delta:g} m) for answers of m letters: best-of-n then "
        f"may spend {delta:g} nats per letter, which is what the tilted model spends. Per letter, its reward and its law approach "
        "the tilt's, but slowly, about "
        f"as log m / m, and at the price of n = {last.n:.2g} answers at m = {last.m}.\n\n"
        "The rate function says how unlikely a mean reward θ is: exp(−m J(θ)), zero where the model earns. Alignment moves the zero.",
    )  # fmt: skip
    run.figure("lengths", plots.lengths_figure(results), "Exact, by counting letters instead of listing answers.")
    run.figure("rate", plots.rate_figure(LETTERS_P, LETTERS_Q, (0.0, alpha, 4.0)), "Rate function of the mean reward per letter; dots: what the model earns.")
    run.table(
        "Best-of-exp(m delta) against the tilt of the same budget, per letter",
        [
            {
                "m": x.m, "n": f"{x.n:.4g}", "reward, tilt": f"{x.reward_tilt:.5f}", "reward, best-of-n": f"{x.reward_bon:.5f}",
                "gap": f"{x.gap:.5f}", "KL(best-of-n || tilt)": f"{x.kl_bon_tilt:.5f}", "KL(best-of-n || model)": f"{x.kl_bon:.5f}",
            }
            for x in results
        ],
        note=f"p = {LETTERS_P}, q = {LETTERS_Q}, {delta:g} nats per letter, α = {alpha:.5f}. Exact figures; they have no intervals.",
    )  # fmt: skip
    gaps, divergences = [x.gap for x in results], [x.kl_bon_tilt for x in results]
    for name, values, limit in (("reward gap", gaps, 0.0125), ("KL(best-of-n || tilt)", divergences, 0.008)):
        falling = all(b < a for a, b in pairwise(values))
        run.check(f"{name} per letter falls with every length", falling, " > ".join(f"{v:.5f}" for v in values))
        if last.m >= 160 and delta == 0.1:
            run.check(f"{name} per letter below {limit:g} at m = {last.m}", values[-1] < limit, f"{values[-1]:.5f}")
    by_legendre = _legendre(alpha, -1.0)
    by_tilt = theory.rate_function(LETTERS_P, LETTERS_Q, alpha, -1.0)
    run.check("rate function: divergence form equals the Legendre transform", abs(by_legendre - by_tilt) < 1e-8, f"J(−1) = {by_tilt:.7f} and {by_legendre:.7f}")
    run.headline("reward per letter below the tilt", f"{gaps[0]:.3f} → {gaps[-1]:.3f}", f"m = {results[0].m} to {last.m}, {delta:g} nats per letter")


def _legendre(alpha: float, theta: float) -> float:
    """sup_t {t theta - Lambda(alpha + t) + Lambda(alpha)}, by a search over t."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda t: theory.scaled_cumulant(LETTERS_P, LETTERS_Q, t, alpha) - t * theta, options={"xtol": 1e-10})
    return -float(found.fun)
