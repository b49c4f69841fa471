"""`fairlead run infalign-ctrl`: a calibrated, transformed reward trains a model for the way it will be served.

InfAlign-CTRL (Balashankar et al., arXiv 2412.19792) on a tiny Llama whose 625 answers are listed: exp 10 against the
identity under best-of-4, exp -10 under an attacker's worst-of-4, at equal KL divergence. Training is by exact gradients
and, if asked for, from roll-outs with the `rloo` objective. The closed form itself is the decoding package's `infalign`.

Shape suffixes: M answers, S roll-outs, L tokens of an answer, U prefixes (all but the last token), V vocabulary, R distinct
rewards.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import registry, stats
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.rewards import CallableReward
from fairlead.runs import Run

from ..ctrl import CTRL, BetaController

KL, N = 0.5, 4
TRANSFORMS = {"identity": "identity", "exp 10": "exp:10", "exp -10": "exp:-10"}
SERVED = ("one sample", f"best-of-{N}", f"worst-of-{N}")


class InfAlignCtrlConfig(MethodConfig):
    """Sizes; the defaults finish in under a minute on one core."""

    vocab: int = Field(5, ge=2, description="tokens of the language model")
    length: int = Field(4, ge=2, le=8, description="tokens of an answer; vocab^length answers are listed")
    hidden: int = Field(48, ge=8, multiple_of=8, description="width of the language model")
    head_scale: float = Field(6.0, gt=0, description="factor on the output layer; larger is a more peaked model")
    references: int = Field(100, ge=2, description="reference answers that calibrate the reward")
    steps: int = Field(300, ge=1, description="training steps per transform")
    warmup: int = Field(60, ge=0, description="steps at the closed-form beta before it is controlled")
    control_rate: float = Field(0.03, ge=0, description="largest change of log beta per step")
    learning_rate: float = Field(5e-4, gt=0, description="learning rate of Adam")
    sampled: bool = Field(False, description="train from roll-outs with rloo as well")
    models: int = Field(5, ge=2, description="models of the sampled part, seeded 5 seed, 5 seed + 1, ... by default")
    rollouts: int = Field(256, ge=2, description="roll-outs per step of the sampled part")


class InfAlignCtrl(Recipe):
    """Win rates after best-of-n and worst-of-n of policies trained on calibrated, transformed rewards at equal KL."""

    Config = InfAlignCtrlConfig
    config: InfAlignCtrlConfig

    def __call__(self, run: Run) -> None:
        run.describe("InfAlign-CTRL", "Calibrate a reward and transform it for the way the model is served.", "2412.19792")
        rows = []
        for name in (*TRANSFORMS, "exp 10, β fixed"):
            work = partial(train, self.config, run.seed, name.removesuffix(", β fixed"), run, controlled="fixed" not in name)
            rows.append(run.stage(f"train-{name}", work) | {"transform": name})
        report(run, rows)
        if self.config.sampled:
            seeds = range(run.seed * self.config.models, (run.seed + 1) * self.config.models)
            found = [run.stage(f"rloo-{name}-{s}", partial(train, self.config, s, name, run, sampled=True)) for s in seeds for name in TRANSFORMS]
            report_sampled(run, found)


def train(
    config: InfAlignCtrlConfig, seed: int, name: str, run: Run, *, controlled: bool = True, sampled: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Maximise E Phi(C) - beta KL from the reference: by the exact gradient, or by rloo on roll-outs that carry the KL term."""
    reference = tiny_llama(config, seed)
    answers_ML = torch.cartesian_prod(*[torch.arange(config.vocab)] * config.length)
    weight_LV = torch.randn(config.length, config.vocab, generator=torch.Generator().manual_seed(seed))
    prompt = torch.tensor([config.vocab])

    def token_reward(prompts: Any, responses: Any) -> torch.Tensor:
        return torch.stack([weight_LV[torch.arange(len(y)), y].sum() for y in responses])

    ctrl = CTRL(
        reward=CallableReward(function=token_reward), transform=TRANSFORMS[name], samples=config.references,
        max_new_tokens=config.length, seed=seed, folder=run.dir / "references",
    )  # fmt: skip
    phi_M = ctrl.calibrate(reference, None, [prompt])([prompt] * len(answers_ML), list(answers_ML)).double()
    beta = BetaController(ctrl.starting_beta(KL), KL, config.control_rate, config.warmup if controlled else config.steps)
    with torch.no_grad():
        log_p_M = answer_logprobs(reference, answers_ML)
    policy, rollouts = copy.deepcopy(reference), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    path = []
    for step in range(config.steps):
        log_q_M = answer_logprobs(policy, answers_ML)
        if sampled:
            drawn_S = torch.multinomial(log_q_M.detach().exp(), config.rollouts, replacement=True, generator=rollouts)
            loss, kl = rollout_loss(log_q_M, log_p_M, phi_M, beta.beta, drawn_S)
        else:
            loss, kl = exact_loss(log_q_M, log_p_M, phi_M, beta.beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append([kl, beta.update(kl)])
        if step % 50 == 49:
            run.progress(f"{'rloo' if sampled else 'exact'}, {name}, model {seed}", step + 1, config.steps)
    with torch.no_grad():
        log_q_M = answer_logprobs(policy, answers_ML)
    kl_reached = float((log_q_M.exp() * (log_q_M - log_p_M)).sum())
    rates = win_rates(log_q_M, log_p_M, token_reward([], answers_ML))
    return {"transform": name, "seed": seed, "kl": kl_reached, "beta": beta.beta, "rates": rates, "path": path}


def exact_loss(log_q_M: torch.Tensor, log_p_M: torch.Tensor, phi_M: torch.Tensor, beta: float) -> tuple[torch.Tensor, float]:
    """beta KL - E Phi of a policy whose answers are listed, and KL in nats."""
    kl = (log_q_M.exp() * (log_q_M - log_p_M)).sum()
    return beta * kl - (log_q_M.exp() * phi_M).sum(), float(kl.detach())


def rollout_loss(
    log_q_M: torch.Tensor, log_p_M: torch.Tensor, phi_M: torch.Tensor, beta: float, drawn_S: torch.Tensor
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """rloo on one group of roll-outs with the reward Phi - beta log q/p, whose gradient is `exact_loss`'s on average, and
    the estimate of KL."""
    ratio_S = (log_q_M - log_p_M).detach()[drawn_S]
    ones_S = torch.ones_like(drawn_S)
    batch = SequenceStats(log_q_M[drawn_S], length=ones_S, group=ones_S, reward=phi_M[drawn_S] - beta * ratio_S)
    return registry.create("objective", "rloo")(batch).loss, float(ratio_S.mean())


def tiny_llama(config: InfAlignCtrlConfig, seed: int) -> Any:
    """A random Llama over tokens 0..vocab-1 and a beginning-of-text token, `vocab`, that is never drawn; no end token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": config.hidden, "intermediate_size": 2 * config.hidden, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(
            **sizes, vocab_size=config.vocab + 1, bos_token_id=config.vocab, eos_token_id=None, pad_token_id=None, max_position_embeddings=16
        ))  # fmt: skip
        model.lm_head.weight *= config.head_scale
        never = torch.zeros(config.vocab + 1).index_fill(0, torch.tensor(config.vocab), -1e9)  # finite: p log p stays 0
        model.lm_head.bias = torch.nn.Parameter(never, requires_grad=False)
    return model.eval()


def answer_logprobs(model: Any, answers_ML: torch.Tensor) -> torch.Tensor:
    """log p of all answers, listed in lexicographic order, after the beginning-of-text token: float64 [M], differentiable."""
    vocab = int(answers_ML.max()) + 1
    prefixes_UL = answers_ML[::vocab, :-1]
    rows = torch.cat([torch.full((len(prefixes_UL), 1), vocab), prefixes_UL], 1)
    logp_ULV = model(input_ids=rows, use_cache=False).logits.double().log_softmax(-1)[..., :vocab]
    before_U = logp_ULV[:, :-1].gather(-1, prefixes_UL[..., None])[..., 0].sum(-1)
    return (before_U[:, None] + logp_ULV[:, -1]).flatten()


def win_rates(log_q_M: torch.Tensor, log_p_M: torch.Tensor, r_M: torch.Tensor, n: int = N) -> list[float]:
    """P(the policy's answer is better than the reference's), ties half: of one sample, and with both served as the best and as
    the worst of n. Exact: the best of n lies below a reward with probability F^n, the worst above it with (1 - F)^n."""
    _, place_M = r_M.unique(return_inverse=True)

    def served(log_x_M: torch.Tensor) -> list[torch.Tensor]:
        upto_R = torch.zeros(int(place_M.max()) + 1, dtype=torch.float64).index_add(0, place_M, log_x_M.double().exp()).cumsum(0).clamp(max=1)
        return [torch.cat([torch.zeros(1), cdf_R]) for cdf_R in (upto_R, upto_R**n, 1 - (1 - upto_R) ** n)]

    return [float((ours.diff() * (theirs[1:] + theirs[:-1]) / 2).sum()) for ours, theirs in zip(served(log_q_M), served(log_p_M), strict=True)]


def report(run: Run, rows: list[dict[str, Any]]) -> None:
    """Table, training path and thresholds of the exact part."""
    by = {row["transform"]: row for row in rows}
    plain, best, worst = (by[name] for name in TRANSFORMS)
    gain, robust = best["rates"][1] - plain["rates"][1], worst["rates"][2] - plain["rates"][2]
    fixed = by["exp 10, β fixed"]
    run.section(
        "Train for the way the model is served",
        f"The reward becomes its quantile among reference answers, and the quantile is transformed. At {KL} nats, exp 10 adds "
        f"{gain:+.3f} to the identity's win rate after best-of-{N}, and exp -10 adds {robust:+.3f} after worst-of-{N}. A single sample "
        f"pays for either.\n\nWith beta left at its closed-form value, exp 10 ends at {fixed['kl']:.3f} nats: the quantiles of "
        "a few reference answers are coarse at the top. So methods are compared at a controlled divergence, never at equal beta.",
    )  # fmt: skip
    figure(run, rows)
    run.table("Trained policies", table(rows), note="Exact win rates against the reference served in the same way.")
    for row in rows:
        run.metric("trained", row["rates"][0], **{k: v for k, v in row.items() if k != "path"})
    apart = abs(best["kl"] - plain["kl"])
    run.check(
        f"best-of-{N}: exp 10 beats identity by more than .04, divergences within .02", gain > 0.04 and apart < 0.02,
        f"gain {gain:.4f}, |difference of KL| {apart:.4f}",
    )  # fmt: skip
    run.check(
        f"worst-of-{N}: exp -10 beats identity by more than .015 at no more divergence", robust > 0.015 and worst["kl"] <= plain["kl"],
        f"gain {robust:.4f}, KL {worst['kl']:.4f} against {plain['kl']:.4f}",
    )  # fmt: skip
    lead = plain["rates"][0] - max(best["rates"][0], worst["rates"][0])
    run.check("one sample: identity is best", lead > 0, f"lead {lead:.4f}")
    run.headline(f"best-of-{N} win rate, exp 10 over identity", f"{gain:+.3f}", f"at {best['kl']:.3f} and {plain['kl']:.3f} nats")
    run.headline(f"worst-of-{N} win rate, exp -10 over identity", f"{robust:+.3f}", f"at {worst['kl']:.3f} and {plain['kl']:.3f} nats")


def report_sampled(run: Run, rows: list[dict[str, Any]]) -> None:
    """The same comparisons after training from roll-outs, paired over models."""
    rate = {name: np.array([x["rates"] for x in rows if x["transform"] == name]) for name in TRANSFORMS}
    run.table("Trained from roll-outs, rloo", table(rows), note="Exact win rates against the reference served in the same way.")
    for name, place, other in (("exp 10", 1, "identity"), ("exp -10", 2, "identity"), ("identity", 0, "exp 10"), ("identity", 0, "exp -10")):
        gain = stats.paired_difference(rate[name][:, place], rate[other][:, place], level=0.9)  # its lower end: one-sided at .05
        run.check(
            f"roll-outs, {SERVED[place]}: {name} over {other}, one-sided paired t test at .05", gain.low > 0,
            f"{gain.estimate:+.4f}, lower end {gain.low:+.4f}, {gain.n} models",
        )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a report's table."""
    return [
        {"Φ": x["transform"], "model": x["seed"], "KL, nats": f"{x['kl']:.3f}", "β": f"{x['beta']:.4f}"}
        | {label: f"{rate:.3f}" for label, rate in zip(SERVED, x["rates"], strict=True)}
        for x in rows
    ]


def figure(run: Run, rows: list[dict[str, Any]]) -> None:
    """Divergence and beta during training."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for row in rows:
        path = np.array(row["path"])
        left.plot(path[:, 0], lw=1, label=row["transform"])
        right.plot(path[:, 1] / path[0, 1], lw=1)
    left.axhline(KL, color="black", lw=0.8, ls=":")
    left.set(xlabel="training step", ylabel="KL divergence, nats")
    right.set(xlabel="training step", ylabel="β over its closed-form value")
    left.legend(frameon=False, fontsize=8)
    run.figure("training", drawn, "Divergence from the reference and the controlled beta.")
