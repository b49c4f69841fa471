"""`fairlead compare-decoders`: the frontier of a set of decoders: reward against divergence, and what each of them costs.

On an enumerable model (the default) every answer can be listed, so the exact tilt is drawn as the ceiling that no decoder can
pass, and the reward of best-of-n is exact. On any other model the figures are those of the answers: reward, the reward held
out, the decoder's own divergence with its kind, diversity, tokens, calls and seconds.

Diversity is the product over n = 2..4 of the share of distinct n-grams in an answer (arXiv 2405.20495); short answers have few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import models, records, registry
from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.kinds import Recipe
from fairlead.kinds.reward import as_reward
from fairlead.runs import Run

from .. import theory
from ..enumerable import RandomTokenReward, all_answers, answer_logprobs, tiny_llama
from .transfer_q_star import align

ENUMERABLE = "enumerable"
VOCAB, LENGTH = 5, 4
SWEEP = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def _default_decoders() -> list[Any]:
    guided = {"mode": "sample", "top_k": VOCAB}
    return [
        *({"name": "best-of-n", "n": n} for n in (1, 2, 4, 8, 16)),
        *({"name": "transfer-q-star", "alpha": a, "horizon": LENGTH, "rollouts": 8, "rollout": "aligned", **guided} for a in SWEEP),
        *({"name": "controlled-decoding", "alpha": a, "horizon": LENGTH, "rollouts": 8, **guided} for a in SWEEP),
        *({"name": "args", "w": 1 / a, **guided} for a in SWEEP),
        *({"name": "soft-best-of-n", "n": 16, "alpha": a} for a in (0.2, 0.8)),
        {"name": "worst-of-n", "n": 4},
        {"name": "rejection", "threshold": 1.5, "n": 64},
        {"name": "blockwise", "n": 4, "block": 2},
        *({"name": "genarm", "reward_model": "aligned", "reference": "model", "beta": b, "mode": "sample"} for b in (2.0, 1.0, 0.5)),
        *({"name": "deal", "lam": 1 / a, "lookahead": LENGTH, "top_k": VOCAB} for a in (0.1, 0.4, 1.6)),
    ]


class CompareDecodersConfig(MethodConfig):
    """What is compared, on what."""

    model: str = Field(ENUMERABLE, description="causal LM (folder, hub id, zoo:NAME), or enumerable: a tiny model with the exact tilt as ceiling")
    reward: Any = Field(None, description="registered reward (or {name, settings}) that guides; none on the enumerable model: its own")
    held_out: Any = Field(None, description="reward (or {name, settings}) that only judges")
    decoders: list[Any] = Field(default_factory=_default_decoders, min_length=1, description="registered decoders: {name: ..., settings}, or names")
    prompts: str = Field("", description="JSONL, Parquet or text file of prompts; not for the enumerable model")
    samples: int = Field(400, ge=2, description="answers of each decoder on the enumerable model; at most so many prompts of a file")
    max_new_tokens: int = Field(64, ge=1, description="longest answer; the enumerable model has its own length")
    budget: dict[str, float] | None = Field(None, description="limit per prompt: model_tokens, reward_calls, seconds")


class CompareDecoders(Recipe):
    """Frontier of decoders under one reward."""

    Config = CompareDecodersConfig
    config: CompareDecodersConfig

    def __call__(self, run: Run) -> None:
        c = self.config
        world = _Enumerable(run.seed) if c.model == ENUMERABLE else _Given(c)
        rows = []
        for index, entry in enumerate(c.decoders):
            settings = {"name": entry} if isinstance(entry, str) else dict(entry)
            run.progress("decoders", index, len(c.decoders))
            rows.append(run.stage(f"{index}-{_label(settings)}", partial(measure, world, settings, c, run.seed)))
        report(run, world, rows)


class _Enumerable:
    """A tiny model, a random additive reward, a held-out one that agrees with it in part, and an aligned companion."""

    def __init__(self, seed: int) -> None:
        self.model, self.tokenizer, self.room = tiny_llama(VOCAB, head_scale=12.0, seed=seed), None, LENGTH
        self.reward: Any = RandomTokenReward(vocab=VOCAB, positions=LENGTH, scale=0.5, seed=seed)
        other = RandomTokenReward(vocab=VOCAB, positions=LENGTH, scale=0.5, seed=seed + 1)
        mixed = RandomTokenReward(vocab=VOCAB, positions=LENGTH, seed=seed)
        mixed.table_LV = 0.8 * self.reward.table_LV + 0.6 * other.table_LV
        self.held_out: Any = mixed
        self.prompt = torch.tensor([VOCAB])
        answers = all_answers(VOCAB, LENGTH)
        self.log_p = answer_logprobs(self.model, self.prompt, answers).numpy()
        self.r = self.reward.exact(answers).numpy()
        self._seed, self._aligned = seed, None

    @property
    def aligned(self) -> Any:
        """The model trained towards the tilt at beta = .3."""
        if self._aligned is None:
            self._aligned = align(self.model, _Exact(self.reward), [self.prompt], all_answers(VOCAB, LENGTH), 0.3, 150, self._seed)
        return self._aligned

    def prompts(self, samples: int) -> list[Any]:
        return [self.prompt] * samples


class _Exact:
    def __init__(self, reward: RandomTokenReward) -> None:
        self.reward = reward

    def exact(self, prompt: torch.Tensor, answers_ML: torch.Tensor) -> torch.Tensor:
        return self.reward.exact(answers_ML)


class _Given:
    """The user's model, reward and prompts."""

    def __init__(self, c: CompareDecodersConfig) -> None:
        if c.reward is None:
            raise InputError("compare-decoders: reward is required with a model of your own; name a registered reward")
        if not c.prompts:
            raise InputError("compare-decoders: prompts is required with a model of your own; give a JSONL, Parquet or text file")
        self.model, self.tokenizer = models.load(c.model)
        self.room = c.max_new_tokens
        self.reward = as_reward(c.reward)
        self.held_out = None if c.held_out is None else as_reward(c.held_out)
        self._rows = c.prompts

    def prompts(self, samples: int) -> list[Any]:
        found = []
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        for row in records.read(models.resolve(self._rows), "raise"):
            text = next((row[name] for name in ("prompt", "messages", "text") if row.get(name)), None)
            if text is None:
                raise InputError(f"{row.where}: has no prompt, messages or text")
            found.append([{"role": "user", "content": text}] if chat and isinstance(text, str) else text)
            if len(found) == samples:
                break
        if not found:
            raise InputError(f"{self._rows}: holds no prompts")
        return found


def measure(world: Any, settings: dict[str, Any], c: CompareDecodersConfig, seed: int) -> dict[str, Any]:
    """One decoder's figures."""
    chosen = dict(settings)
    if isinstance(world, _Enumerable):
        stands_for = {"aligned": lambda: world.aligned, "model": lambda: world.model}
        chosen = {k: stands_for[v]() if isinstance(v, str) and v in stands_for else v for k, v in settings.items()}
    decoder = registry.create("decoder", chosen.pop("name"), **chosen)
    prompts = world.prompts(c.samples)
    made = decoder.generate(
        world.model, world.tokenizer, prompts, reward=world.reward, max_new_tokens=world.room, seed=seed, batch_size=4096 if isinstance(world, _Enumerable) else None,
        budget=c.budget,
    )  # fmt: skip
    rewards = [g.reward if g.reward is not None else math.nan for g in made.generations]
    row = {
        "decoder": settings["name"], "label": _label(settings), "reward": float(np.nanmean(rewards)), "se": float(np.nanstd(rewards) / math.sqrt(len(rewards))),
        "kl": made.kl, "kl_kind": made.kl_kind, "diversity": diversity([g.ids.tolist() for g in made.generations]),
        "tokens": made.cost.model_tokens / len(prompts), "calls": made.cost.reward_calls / len(prompts), "seconds": made.cost.seconds / len(prompts),
        "held_out": None,
    }  # fmt: skip
    if world.held_out is not None:
        texts: list[Any] = [g.ids if world.tokenizer is None else g.text for g in made.generations]
        asked = [p[-1]["content"] if isinstance(p, list) else p for p in prompts]
        row["held_out"] = float(world.held_out(asked, texts).double().mean())
    if isinstance(world, _Enumerable) and settings["name"] == "best-of-n":
        n = settings.get("n", 4)
        row |= {"kl": float(theory.bon_kl_exact(world.log_p, world.r, n)), "kl_kind": "exact", "reward": float(theory.bon_expected_reward(world.log_p, world.r, n)), "se": 0.0}
    return row


def diversity(answers: Sequence[Sequence[int]]) -> float:
    """Mean over answers of the product over n = 2, 3, 4 of distinct n-grams / (n-grams + 1)."""
    found = []
    for answer in answers:
        grams = [[tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)] for n in (2, 3, 4)]
        found.append(math.prod(len(set(g)) / (len(g) + 1) for g in grams))
    return float(np.mean(found)) if found else 0.0


def report(run: Run, world: Any, rows: list[dict[str, Any]]) -> None:
    """The frontier, the table, and what the frontier says."""
    exact = isinstance(world, _Enumerable)
    run.section(
        "What is compared",
        ("A tiny model whose answers can all be listed. The black line is the exact tilted distribution: no decoder can earn more at its divergence. "
         "Its reward is a sum over tokens, so a prefix is judged exactly: the best case for ARGS, which looks no further. "
         if exact else "Each point is one decoder with one setting. Without an enumerable model the divergence is the decoder's own figure, of the kind that the table names. ")
        + "A point further up earns more reward; one further left has strayed less. Compare at equal divergence or equal cost, not at equal alpha.",
    )  # fmt: skip
    run.figure("frontier", _figure(world, rows), "Mean reward against divergence from the model, nats per answer" + ("; error bars: two standard errors." if exact else "."))
    table = [
        {
            "decoder": r["label"], "reward": f"{r['reward']:.3f} ± {2 * r['se']:.3f}", "KL, nats": "–" if r["kl"] is None else f"{r['kl']:.3f} ({r['kl_kind']})",
            "held-out reward": "–" if r["held_out"] is None else f"{r['held_out']:.3f}", "diversity": f"{r['diversity']:.3f}",
            "model tokens": f"{r['tokens']:.0f}", "reward calls": f"{r['calls']:.1f}", "seconds": f"{r['seconds']:.4f}",
        }
        for r in rows
    ]  # fmt: skip
    run.table("Frontier and cost, per answer", table, note="Tokens, calls and seconds are means per prompt; every model's tokens count.")
    best = max(rows, key=lambda r: r["reward"])
    run.headline("highest reward", f"{best['reward']:.3f}", best["label"])
    for r in rows:
        run.metric("decoder", r["label"], reward=r["reward"], kl=r["kl"], kl_kind=r["kl_kind"], held_out=r["held_out"], tokens=r["tokens"])
    if not exact:
        return
    above = []
    for r in rows:
        if r["kl"] is not None and r["kl_kind"] in ("exact", "estimate"):
            above.append(r["reward"] - ceiling(world, r["kl"]) - 3 * r["se"])
    run.check("no decoder lies above the exact tilt", max(above) <= 5e-3, f"largest excess {max(above):+.4f} after three standard errors, {len(above)} settings")
    _orders(run, world, rows)


def _orders(run: Run, world: _Enumerable, rows: list[dict[str, Any]]) -> None:
    """Transfer Q* against its baselines at the divergences that it spends, said as it is."""
    curves = {name: sorted((r["kl"], r["reward"]) for r in rows if r["decoder"] == name and r["kl"] is not None) for name in {r["decoder"] for r in rows}}
    star = curves.get("transfer-q-star", [])
    lines = []
    for name in ("controlled-decoding", "args"):
        other = curves.get(name, [])
        if len(star) < 2 or len(other) < 2:
            continue
        kl, reward = np.array(other).T
        inside = [(k, r) for k, r in star if kl.min() <= k <= kl.max()]
        if not inside:
            continue
        gains = [r - float(np.interp(k, kl, reward)) for k, r in inside]
        word = "above" if min(gains) > 0 else "below" if max(gains) < 0 else "on either side of"
        lines.append(f"At equal divergence transfer-q-star lies {word} {name}: {', '.join(f'{g:+.3f} at {k:.2f} nats' for g, (k, _) in zip(gains, inside, strict=True))}.")
        run.metric(f"transfer_q_star_over_{name}", float(np.mean(gains)))
    if lines:
        run.section("At equal divergence", "\n\n".join(lines))


def ceiling(world: _Enumerable, kl: float) -> float:
    """The most that any distribution at this divergence can earn."""
    alpha = theory.solve_alpha(world.log_p, world.r, max(kl, 0.0))
    return float(np.exp(theory.tilt(world.log_p, world.r, alpha)) @ world.r)


def _label(settings: dict[str, Any]) -> str:
    shown = {k: v for k, v in settings.items() if k in ("n", "alpha", "beta", "w", "lam", "block", "gamma", "threshold", "beam")}
    return settings["name"] + (f" ({', '.join(f'{k} {v:.3g}' for k, v in shown.items())})" if shown else "")


def _figure(world: Any, rows: list[dict[str, Any]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.4, 4.4))
    known = [r for r in rows if r["kl"] is not None]
    if isinstance(world, _Enumerable):
        grid = np.linspace(0, max([r["kl"] for r in known] + [1.0]) * 1.05, 80)
        axis.plot(grid, [ceiling(world, k) for k in grid], "k-", linewidth=1.4, label="exact tilt (ceiling)")
    for marker, name in zip("osv^DPX*<>", dict.fromkeys(r["decoder"] for r in known), strict=False):
        mine = sorted((r for r in known if r["decoder"] == name), key=lambda r: r["kl"])
        axis.errorbar([r["kl"] for r in mine], [r["reward"] for r in mine], yerr=[2 * r["se"] for r in mine], fmt=f"{marker}-", markersize=4.5, linewidth=1, capsize=2, label=name)
    axis.set(xlabel="KL divergence from the model, nats per answer", ylabel="mean reward")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    plt.close(figure)
    return figure
