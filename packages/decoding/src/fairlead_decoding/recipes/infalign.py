"""`fairlead run infalign`: train for the way the model will be served, best-of-n or an attacker's worst-of-n.

Balashankar et al., "InfAlign: Inference-aware language model alignment" (arXiv 2412.19792). Part one is the closed form,
the same for every model and reward; part two holds it against listed outcomes; part three trains small language models
on transformed, calibrated rewards with exact gradients, at equal KL divergence. The trainer here is a plain loop on
models whose every answer is listed; training at scale is the training package's.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import stats
from fairlead.config import MethodConfig
from fairlead.generation import generate
from fairlead.kinds import Recipe
from fairlead.runs import Run

from .. import theory
from ..enumerable import (
    RandomTokenReward,
    all_answers,
    answer_index,
    answer_logprobs,
    tiny_llama,
    trainable_answer_logprobs,
)
from ..theory import BestOfN, Identity, Transform, WorstOfN, plots

KL = 0.5
N = 4
PROCEDURES = (Identity(), BestOfN(N), WorstOfN(N))
TRAINED = ("identity", "exp:10", "exp:-10")
LABELS = {"identity": "identity", "exp:10": "exp 10", "exp:-10": "exp -10"}
# In the order of `closed_form`: win rates of one sample, after best-of-4 and after worst-of-4 at 0.5 nats, and beta of the transform as it is written.
FRONTIER = {
    "identity": (0.7737, 0.7998, 0.8860, 0.2428), "log": (0.7682, 0.7682, 0.9270, 0.4321),
    "exp 5, raw": (0.7461, 0.8566, 0.7465, 47.95), "exp 10, raw": (0.7117, 0.8715, 0.6763, 7012),
    "exp -5, raw": (0.7539, 0.7230, 0.9439, 0.0703), "exp -10, raw": (0.7358, 0.6859, 0.9476, 0.01151),
    "optimal for best-of-n, n = 4": (0.7025, 0.8733, 0.6646, 0.2166),
    "optimal for worst-of-n, n = 4": (0.7344, 0.6803, 0.9479, 0.2084),
}  # fmt: skip
POOLS, PER_POOL = 64, 16


class InfAlignConfig(MethodConfig):
    """Sizes; the defaults finish in about a minute on one core."""

    outcomes: int = Field(4096, ge=64, description="outcomes of each listed distribution of the second part")
    draws: int = Field(5, ge=2, description="random distributions of the second part, with two reward laws each")
    models: int = Field(3, ge=1, description="random language models of the third part, seeded 3 seed, 3 seed + 1, ... by default")
    vocab: int = Field(5, ge=2, description="tokens of a language model")
    length: int = Field(4, ge=1, description="tokens of an answer; vocab^length answers are listed")
    hidden: int = Field(48, ge=8, multiple_of=8, description="width of a language model")
    head_scale: float = Field(6.0, gt=0, description="factor on the output layer; larger is a more peaked model")
    references: int = Field(100, ge=10, description="reference answers per prompt that calibrate the reward")
    steps: int = Field(400, ge=1, description="training steps per transform")
    free_steps: int = Field(60, ge=0, description="steps at the closed-form beta before the controller of the KL divergence starts")
    learning_rate: float = Field(5e-4, gt=0, description="learning rate of Adam")
    control_rate: float = Field(0.06, ge=0, description="largest change of log beta per step by the controller")
    handicap: float = Field(
        0.01, ge=0, lt=0.02, description="nats by which the other transforms' target divergence lies below the identity's"
    )


class InfAlign(Recipe):
    """Closed-form frontier, its universality, and trained policies at equal divergence under three procedures."""

    Config = InfAlignConfig
    config: InfAlignConfig

    def __call__(self, run: Run) -> None:
        closed = run.stage("frontier", closed_form)
        listed = run.stage("universality", partial(universality, self.config, run.seed))
        rows = []
        for index in range(self.config.models):
            for transform in TRAINED:
                seed = run.seed * self.config.models + index
                work = partial(train, self.config, seed, transform, partial(run.progress, f"training, model {index}, {LABELS[transform]}"))
                rows.append(run.stage(f"train-{index}-{LABELS[transform]}", work))
        trained_section(run, rows, self.config)
        frontier_section(run, closed)
        universality_section(run, listed, self.config)


def closed_form() -> list[dict[str, Any]]:
    """The frontier at KL nats for every transform, by quadrature."""
    makers = (
        Transform.identity(), Transform.log(), *(Transform.exp(t, normalised=False) for t in (5, 10, -5, -10)),
        Transform.optimal("best-of-n", N, kl=KL), Transform.optimal("worst-of-n", N, kl=KL),
    )  # fmt: skip
    found = [theory.frontier(t, kl=KL) for t in makers]
    return [{"name": name, "beta": x.beta, "rates": [x.under(p) for p in PROCEDURES]} for name, x in zip(FRONTIER, found, strict=True)]


def universality(config: InfAlignConfig, seed: int) -> list[dict[str, Any]]:
    """Win rates of exact optima at KL nats on random listed distributions: calibrated exactly, from references, not at all."""
    rng = np.random.default_rng([seed, 7])
    rows = []
    for _ in range(config.draws):
        log_p = np.log(rng.dirichlet(np.ones(config.outcomes)))
        for law in ("normal", "Student t(2)"):
            r = rng.normal(size=config.outcomes) if law == "normal" else rng.standard_t(2, size=config.outcomes)
            exact = theory.calibrate(log_p, r)
            drawn = theory.calibrate_from_samples(r, r[rng.choice(config.outcomes, config.references, p=np.exp(log_p))])
            for calibration, c in (("exact", exact), ("references", drawn)):
                for name in TRAINED:
                    rates = _rates(_optimum(log_p, theory.as_transform(name)(c)), log_p, r)
                    rows.append({"law": law, "calibration": calibration, "transform": name, "rates": rates})
            rows.append({"law": law, "calibration": "none", "transform": "reward itself", "rates": _rates(_optimum(log_p, r), log_p, r)})
    return rows


def _optimum(log_p: np.ndarray, phi: np.ndarray) -> np.ndarray:
    return theory.tilt(log_p, phi, theory.solve_alpha(log_p, phi, KL))


def _rates(log_q: np.ndarray, log_p: np.ndarray, r: np.ndarray) -> list[float]:
    return [float(theory.exact_win_rate(log_q, log_p, r, p)) for p in PROCEDURES]


def train(config: InfAlignConfig, seed: int, transform: str, progress: Any) -> dict[str, Any]:
    """Maximise E Phi(C) - beta KL by exact gradients; beta starts at its closed-form value and then follows the KL.

    The transforms that should win aim a little below the identity's divergence, so that none wins by spending more. The
    learning rate falls over the last quarter, which quiets Adam's jitter of the divergence.
    """
    answers = all_answers(config.vocab, config.length)
    reference = tiny_llama(
        config.vocab, hidden=config.hidden, intermediate=2 * config.hidden, head_scale=config.head_scale, seed=seed
    )
    prompt = torch.tensor([config.vocab])
    log_p = answer_logprobs(reference, prompt, answers)
    r = RandomTokenReward(vocab=config.vocab, positions=config.length, seed=seed).exact(answers).numpy()
    references = _draw(reference, prompt, config, config.references, seed)
    phi = torch.from_numpy(theory.as_transform(transform)(theory.calibrate_from_samples(r, r[references])))
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=config.learning_rate)
    quiet = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 0.05 + 4 * (1 - step / config.steps)))
    target = KL - (0 if transform == "identity" else config.handicap)
    log_beta = float(np.log(theory.frontier(transform, kl=KL).beta))
    path = []
    for step in range(config.steps):
        log_q = trainable_answer_logprobs(policy, prompt, answers)
        kl = (log_q.exp() * (log_q - log_p)).sum()
        loss = np.exp(log_beta) * kl - (log_q.exp() * phi).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quiet.step()
        if step >= config.free_steps:
            log_beta += config.control_rate * float(np.clip((float(kl.detach()) - target) / KL, -1, 1))
        path.append([float(kl.detach()), float(np.exp(log_beta))])
        if step % 20 == 19:
            progress(step + 1, config.steps)
    log_q = answer_logprobs(policy, prompt, answers)
    ours, theirs = (
        r[_draw(m, prompt, config, POOLS * PER_POOL, seed + offset)].reshape(POOLS, PER_POOL)
        for m, offset in ((policy, 101), (reference, 202))
    )
    sampled = [theory.inference_win_rate(ours, theirs, p) for p in PROCEDURES]
    kl_reached = float(theory.kl_divergence(log_q, log_p))
    optimum = theory.tilt(log_p, phi, theory.solve_alpha(log_p, phi, kl_reached))
    return {
        "seed": seed, "transform": transform, "kl": kl_reached, "optimum": _rates(optimum, log_p.numpy(), r), "beta": float(np.exp(log_beta)),
        "rates": _rates(log_q.numpy(), log_p.numpy(), r), "sampled": [[w.mean, w.standard_error] for w in sampled], "path": path,
    }  # fmt: skip


def _draw(model: Any, prompt: torch.Tensor, config: InfAlignConfig, count: int, seed: int) -> np.ndarray:
    """Indices of `count` sampled answers."""
    found = generate(model, None, [prompt], n=count, max_new_tokens=config.length, seed=seed, batch_size=count)[0]
    return answer_index(torch.stack([g.ids for g in found]), config.vocab).numpy()


def trained_section(run: Run, rows: list[dict[str, Any]], config: InfAlignConfig) -> None:
    """Trained policies on the closed-form curves, their table, and the thresholds of the paper's effect."""
    by = {name: [x for x in rows if x["transform"] == name] for name in TRAINED}
    rate = {name: np.array([x["rates"] for x in by[name]]) for name in TRAINED}
    kl = {name: np.array([x["kl"] for x in by[name]]) for name in TRAINED}
    best, worst = rate["exp:10"][:, 1] - rate["identity"][:, 1], rate["exp:-10"][:, 2] - rate["identity"][:, 2]
    miss = max(abs(a - b) for x in rows for a, b in zip(x["rates"], x["optimum"], strict=True))
    run.section(
        "Train for the way the model is served",
        f"A model that will be served as the best of {N} answers should not be trained for the win rate of one. Its reward is first "
        f"calibrated, which makes it a quantile among {config.references} reference answers, and then transformed. At no more KL "
        f"divergence, exp 10 instead of the identity adds {best.mean():+.3f} to the win rate after best-of-{N}.\n\n"
        f"An attacker who keeps the least safe of {N} answers turns the matter round: what counts is the lower end of the "
        f"quantiles, and exp -10 adds {worst.mean():+.3f}. Each gain is paid for in the win rate of a single sample, where the "
        "identity stays best.\n\n"
        "Lines are the closed form, which knows neither the model nor the reward. Circles are trained models. They lie a little off "
        f"the lines because {config.references} reference answers calibrate coarsely: the exact optimum on the same rewards lies where "
        f"the trained model does, within {miss:.3f}.",
    )  # fmt: skip
    points = {theory.as_transform(name).name: [(x["kl"], tuple(x["rates"])) for x in by[name]] for name in TRAINED}
    run.figure(
        "win-rates", plots.win_rate_figure(N, TRAINED, 0.8, points),  # type: ignore[arg-type]
        f"Win rate against the reference model. Lines: closed form. Circles: {config.models} trained models per transform, exact win rates.",
    )
    figure, (left, right) = plots.new_figure(9.0, 3.4, 2)
    for name, colour in zip(TRAINED, plots.PALETTE, strict=False):
        for row in by[name]:
            path = np.array(row["path"])
            left.plot(path[:, 0], color=colour, lw=1, label=LABELS[name] if row is by[name][0] else None)
            right.plot(path[:, 1] / path[0, 1], color=colour, lw=1)
    left.axhline(KL, color="black", lw=0.8, ls=":")
    left.set(xlabel="training step", ylabel="KL divergence, nats")
    right.set(xlabel="training step", ylabel="β over its closed-form value")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    run.figure("training", figure, f"The controller takes over at step {config.free_steps} and brings the divergence to {KL} nats ({KL - config.handicap:g} for exp 10 and exp -10) by moving β.")
    run.table(
        "Trained policies",
        [
            {
                "Φ": LABELS[x["transform"]], "model": x["seed"], "KL, nats": f"{x['kl']:.3f}",
                "one sample": f"{x['rates'][0]:.3f}", f"best-of-{N}": f"{x['rates'][1]:.3f}", f"worst-of-{N}": f"{x['rates'][2]:.3f}",
                **{f"{label}, sampled": f"{m:.3f} ± {1.96 * se:.3f}" for label, (m, se) in zip(("one", f"best-of-{N}", f"worst-of-{N}"), x["sampled"], strict=True)},
            }
            for x in rows
        ],
        note=f"Win rates against the reference served in the same way: exact, and from {POOLS} pools of {PER_POOL} sampled answers with "
        "95 % intervals over pools (all subsets of a pool count; no group is drawn twice).",
    )  # fmt: skip
    pairs = [
        (f"best-of-{N}: exp 10 − identity", rate["exp:10"][:, 1], rate["identity"][:, 1]),
        (f"worst-of-{N}: exp -10 − identity", rate["exp:-10"][:, 2], rate["identity"][:, 2]),
        ("one sample: identity − exp 10", rate["identity"][:, 0], rate["exp:10"][:, 0]),
    ]
    closed = {name: theory.frontier(name, kl=KL) for name in TRAINED}
    predicted = (
        closed["exp:10"].under(PROCEDURES[1]) - closed["identity"].under(PROCEDURES[1]),
        closed["exp:-10"].under(PROCEDURES[2]) - closed["identity"].under(PROCEDURES[2]),
        closed["identity"].standard - closed["exp:10"].standard,
    )
    run.table(
        "What the right transform adds",
        [
            {"difference of win rates": name, "trained": f"{d.estimate:+.3f}", "95 %": _range(d), "closed form": f"{p:+.3f}"}
            for (name, a, b), p in zip(pairs, predicted, strict=True)
            for d in [stats.paired_difference(a, b)]
        ],
        note=f"Paired over {config.models} models; t interval.",
    )
    for x in rows:
        run.metric("trained", x["rates"][1], **{k: v for k, v in x.items() if k != "path"})
    apart = np.abs(kl["exp:10"] - kl["identity"])
    run.check(
        f"best-of-{N}: exp 10 beats identity by more than .04, every model, divergences within .02",
        bool((best > 0.04).all() and (apart < 0.02).all()),
        f"gains {_list(best)}; |difference of KL| {_list(apart)}",
    )
    run.check(
        f"worst-of-{N}: exp -10 beats identity by more than .015, every model, at no more divergence",
        bool((worst > 0.015).all() and (kl["exp:-10"] <= kl["identity"] + 1e-9).all()),
        f"gains {_list(worst)}; KL {_list(kl['exp:-10'])} against {_list(kl['identity'])}",
    )
    single = rate["identity"][:, 0] - np.maximum(rate["exp:10"][:, 0], rate["exp:-10"][:, 0])
    run.check("one sample: identity is best, every model", bool((single > 0).all()), f"lead {_list(single)}")
    run.check("training reaches the exact optimum on the same rewards within .01 of every win rate", miss < 0.01, f"largest difference {miss:.4f} of {3 * len(rows)}")
    scores = [(m - exact) / se for x in rows for exact, (m, se) in zip(x["rates"], x["sampled"], strict=True)]
    run.check("win rates from samples within 4 standard errors of the exact ones", max(map(abs, scores)) <= 4, f"largest |z| {max(map(abs, scores)):.2f} of {len(scores)}")
    run.headline(f"best-of-{N} win rate, exp 10 over identity", f"{best.mean():+.3f}", f"{len(best)} models, {best.min():+.3f} to {best.max():+.3f}; closed form {predicted[0]:+.3f}")
    run.headline(f"worst-of-{N} win rate, exp -10 over identity", f"{worst.mean():+.3f}", f"{len(worst)} models, {worst.min():+.3f} to {worst.max():+.3f}; closed form {predicted[1]:+.3f}")
    run.headline("what exp 10 costs a single sample", f"{rate['exp:10'][:, 0].mean() - rate['identity'][:, 0].mean():+.3f}", f"closed form {-predicted[2]:+.3f}")


def frontier_section(run: Run, closed: list[dict[str, Any]]) -> None:
    """The closed-form table and its pictures."""
    run.section(
        "The closed form",
        "For a reward without atoms only the quantile u of an answer matters. The optimum has density exp(Φ(u) / β) over quantiles, and "
        "a procedure weighs quantiles by g(u): one-dimensional integrals give every win rate. The optimal transform for a procedure "
        "is the fixed point Φ(u) = −∫ g(F(v)) g(v) dv from u to 1; exp 10 and exp -10 come within .003 of it.",
    )
    run.figure("procedures", plots.procedures_figure(N, KL, TRAINED), "Best-of-n rewards the upper tail; robustness to worst-of-n empties the lower one.")
    run.table(
        f"Win rates at {KL} nats, closed form",
        [
            {"Φ": x["name"], "one sample": f"{x['rates'][0]:.4f}", f"best-of-{N}": f"{x['rates'][1]:.4f}", f"worst-of-{N}": f"{x['rates'][2]:.4f}", "β": f"{x['beta']:.4g}"}
            for x in closed
        ],
        note="By quadrature, exact to the digits shown. β belongs to Φ as written; an affine change of Φ only rescales it.",
    )  # fmt: skip
    error = max(abs(a - b) for x in closed for a, b in zip(x["rates"], FRONTIER[x["name"]], strict=False))
    scale = max(abs(x["beta"] / FRONTIER[x["name"]][3] - 1) for x in closed)
    run.check("closed form: win rates and β as tabulated, within .001", error < 1e-3 and scale < 1e-3, f"largest difference {error:.1e}, of β relatively {scale:.1e}")
    leaders = [closed[int(np.argmax([x["rates"][place] for x in closed]))]["name"] for place in range(3)]
    run.check(
        "closed form: the optimal transform leads in its own column", leaders == ["identity", *list(FRONTIER)[-2:]],
        f"one sample: {leaders[0]}; best-of-{N}: {leaders[1]}; worst-of-{N}: {leaders[2]}",
    )  # fmt: skip


def universality_section(run: Run, rows: list[dict[str, Any]], config: InfAlignConfig) -> None:
    """Exact optima on listed outcomes against the closed form, and what the raw reward does instead."""
    def column(place: int, **wanted: str) -> np.ndarray:
        return np.array([x["rates"][place] for x in rows if all(x[k] == v for k, v in wanted.items())])

    closed = {name: theory.frontier(name, kl=KL) for name in TRAINED}
    raw = {law: column(1, calibration="none", law=law) for law in ("normal", "Student t(2)")}
    run.section(
        "Calibration makes it universal",
        f"{config.draws} random distributions over {config.outcomes} outcomes, each with a Gaussian and with a heavy-tailed reward. On "
        "calibrated rewards, the exact optimum reproduces the closed form whatever the reward's law. On the reward itself it depends "
        f"on that law: at {KL} nats the win rate after best-of-{N} is {raw['normal'].mean():.3f} for Gaussian rewards and "
        f"{raw['Student t(2)'].mean():.3f} for heavy tails, since a few outliers eat the budget.",
    )  # fmt: skip
    figure, (axis,) = plots.new_figure(7.4, 3.4)
    groups = [("exp:10", "exact"), ("exp:10", "references"), ("identity", "exact"), ("identity", "references"), ("reward itself", "none")]
    names = {"exact": "exact C", "references": f"C from {config.references} answers", "none": "not calibrated"}
    for shift, (law, colour) in zip((-0.12, 0.12), (("normal", plots.BLUE), ("Student t(2)", plots.ORANGE)), strict=True):
        for place, (transform, calibration) in enumerate(groups):
            values = column(1, transform=transform, calibration=calibration, law=law)
            axis.plot(np.full(len(values), place + shift), values, "o", ms=4, color=colour, alpha=0.75, label=f"reward: {law}" if place == 0 else None)
    for place, (transform, _) in enumerate(groups[:4]):
        axis.plot([place - 0.3, place + 0.3], [closed[transform].under(PROCEDURES[1])] * 2, color="black", lw=1, label="closed form" if place == 0 else None)
    axis.set_xticks(range(len(groups)), [f"{LABELS.get(t, t)}\n{names[c]}" for t, c in groups], fontsize=8)
    axis.set_ylabel(f"win rate after best-of-{N}")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    run.figure("universality", figure, f"Each dot is the exact optimum at {KL} nats on one random distribution.")
    run.table(
        "Universality", [
            {
                "Φ": LABELS.get(t, t), "calibration": names[c], "reward": law,
                **{label: _spread(column(place, transform=t, calibration=c, law=law)) for place, label in enumerate(("one sample", f"best-of-{N}", f"worst-of-{N}"))},
            }
            for t, c in [*groups[:4], ("exp:-10", "exact"), ("exp:-10", "references"), groups[4]]
            for law in ("normal", "Student t(2)")
        ],
        note=f"Mean ± standard deviation over {config.draws} draws.",
    )  # fmt: skip
    error = max(
        float(np.abs(column(place, transform=name, calibration="exact") - closed[name].under(p)).max())
        for name in TRAINED for place, p in enumerate(PROCEDURES)
    )  # fmt: skip
    run.check("universality: exact calibration reproduces the closed form within .001 for both reward laws", error < 1e-3, f"largest difference {error:.1e}")
    for name, place, target, slack in (("identity", 1, 0.794, 0.010), ("exp:10", 1, 0.868, 0.003), ("exp:-10", 2, 0.947, 0.001)):
        values = column(place, transform=name, calibration="references")
        mean = float(values.mean())
        run.check(
            f"universality: {LABELS[name]} on {config.references} references, {PROCEDURES[place].name}", abs(mean - target) < slack,
            f"mean {mean:.4f} against {target} ± {slack}",
        )  # fmt: skip
    heavy = raw["Student t(2)"]
    run.check(
        "universality: uncalibrated heavy-tailed rewards waste the budget", bool((heavy < 0.84).all() and heavy.mean() < 0.80),
        f"best-of-{N} {heavy.mean():.3f}, {heavy.min():.3f} to {heavy.max():.3f}, against {closed['exp:10'].under(PROCEDURES[1]):.3f} with exp 10",
    )  # fmt: skip
    run.check("universality: uncalibrated Gaussian rewards", abs(raw["normal"].mean() - 0.844) < 0.003, f"best-of-{N} {raw['normal'].mean():.4f} against .844")
    run.headline(f"best-of-{N} win rate on raw heavy-tailed rewards", f"{heavy.mean():.3f}", f"exp 10 on calibrated ones: {column(1, transform='exp:10', calibration='references', law='Student t(2)').mean():.3f}")


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def _range(d: stats.Interval) -> str:
    return f"{d.low:+.3f} to {d.high:+.3f}" if np.isfinite(d.low) else "one model"
