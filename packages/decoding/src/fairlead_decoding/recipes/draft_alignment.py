"""`fairlead run draft-alignment`: does a draft that is trained on the refusal rate itself get more tokens accepted?

Paper: "Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs" (arXiv 2403.00858). First a
chain whose draft is too small on purpose, where every loss can be trained to its end; then letters of real text, with a
transformer as target, a tenth of it as draft, and decoding by `Speculative`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from fairlead import letters, stats
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe
from fairlead.runs import Run

from ..speculative import block_efficiency
from ..theory.plots import BLUE, GREEN, GREY, ORANGE, new_figure
from . import draft_world as world

BEFORE, KL, TVD = "before", "KL", "TVD"
COLOURS = {BEFORE: GREY, KL: BLUE, TVD: ORANGE}
CHAIN_LABELS = {"kl": "KL, goes on", "rkl": "reverse KL", "tvd": "TVD", "tvdpp": "TVD++"}
PROMPT = 16


class DraftAlignmentConfig(MethodConfig):
    """Sizes of the two parts; the defaults take two to three minutes on one core."""

    chains: int = Field(5, ge=2, description="random chains of the closed part")
    chain_letters: int = Field(12, ge=3, description="letters of a chain")
    chain_steps: int = Field(300, ge=20, description="optimiser steps of the warm start, and of each loss after it")
    target_layers: int = Field(3, ge=1, description="layers of the target")
    target_width: int = Field(96, ge=16, multiple_of=16, description="hidden width of the target")
    target_steps: int = Field(500, ge=20, description="training steps of the target")
    draft_width: int = Field(32, ge=8, multiple_of=8, description="hidden width of the one-layer draft")
    draft_steps: int = Field(1000, ge=20, description="steps of the draft's training on plain text")
    distillation_texts: int = Field(1024, ge=64, description="answers of the target that the draft is aligned on")
    distillation_tokens: int = Field(48, ge=8, description="tokens of such an answer")
    distillation_steps: int = Field(1000, ge=20, description="steps of each alignment loss")
    batch_size: int = Field(32, ge=1, description="texts per training step")
    prompts: int = Field(256, ge=16, description="held-out prompts that are answered")
    tokens: int = Field(40, ge=8, description="tokens of each answer")
    gamma: int = Field(4, ge=1, description="tokens that the draft proposes for each call of the target")


class DraftAlignment(Recipe):
    """KL, reverse KL, TVD and TVD++ on chains; plain, KL-aligned and TVD-aligned drafts on letters."""

    Config = DraftAlignmentConfig
    config: DraftAlignmentConfig

    def __call__(self, run: Run) -> None:
        run.describe(
            "Draft alignment", "Does a draft that is trained on the refusal rate itself get more tokens accepted?", "2403.00858"
        )
        self._chains(run)
        self._letters(run)

    def _chains(self, run: Run) -> None:
        c = self.config

        def work() -> list[dict[str, float]]:
            found = []
            for i in range(c.chains):
                run.progress("chains", i, c.chains)
                found.append(world.chain_experiment(1000 * run.seed + i, c.chain_letters, c.chain_steps))
            return found

        found = run.stage("chains", work)
        gaps = np.array([f["tvd"] - f["kl"] for f in found])
        rows = []
        for kind, label in CHAIN_LABELS.items():
            values = np.array([f[kind] for f in found])
            gap = stats.paired_difference(values, [f["kl"] for f in found])
            against = "" if kind == "kl" else f"{gap.estimate:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
            rows.append({"loss after the warm start": label, "acceptance": f"{stats.mean(values)}", "against KL, paired": against})
            run.metric(f"chain acceptance, {label}", float(values.mean()))
        run.section(
            "A chain and a draft that cannot follow it",
            f"The target looks two letters back, the draft one, so no loss can make them equal: {c.chains} chains of {c.chain_letters} "
            f"letters, {c.chain_steps} steps of KL divergence, then {c.chain_steps} more of each loss from that point.\n\n"
            "KL is at its end and gains nothing more. The total variation distance is the refusal rate itself, and finds a draft that "
            "is accepted more often although its likelihood is worse. TVD++ follows it step for step: with sums over the whole "
            "vocabulary its normalised advantage only scales the gradient, and Adam takes scales out.",
        )
        run.table(f"Acceptance, mean over {c.chains} chains with 95 % intervals", rows)
        run.check("chains: TVD beats KL by more than .02 in every chain", bool((gaps > 0.02).all()), f"{', '.join(f'{g:.3f}' for g in gaps)}")
        apart = max(abs(f["tvdpp"] - f["tvd"]) for f in found)
        run.check("chains: TVD++ and TVD agree within .002", apart < 0.002, f"largest difference {apart:.1e}")
        run.headline("TVD against KL, chains", f"{gaps.mean():+.3f}", f"acceptance, {gaps.min():+.3f} in the worst of {c.chains}")

    def _letters(self, run: Run) -> None:
        c = self.config
        found = run.stage("letters", partial(train_and_decode, c, run))
        drafts = {name: {k: np.asarray(v) for k, v in found["drafts"][name].items()} for name in COLOURS}
        rows = []
        for name, d in drafts.items():
            tau, iid = found["figures"][name]["block_efficiency"], block_efficiency(float(d["acceptance"].mean()), c.gamma)
            rows.append(
                {
                    "draft": {BEFORE: "plain text only", KL: "aligned by KL", TVD: "aligned by TVD"}[name],
                    "acceptance": f"{stats.mean(d['acceptance'])}", "tokens a call, counted": f"{tau:.3f}",
                    "expected": f"{stats.mean(d['tau'])}", "formula of independence": f"{iid:.3f} ({iid / tau - 1:+.1%})",
                    "memory-bound speed-up": f"{found['figures'][name]['memory_bound_speedup']:.2f}x",
                }
            )  # fmt: skip
            run.metric(f"acceptance, {name}", float(d["acceptance"].mean()))
            run.metric(f"tokens a call, {name}", tau)
        ratio = found["figures"][TVD]["parameter_ratio"]
        run.section(
            "Letters of real text",
            f"A transformer learns the docstrings of Python's standard library letter by letter ({found['target_loss']:.2f} nats a letter on "
            f"held-out text); the draft has {ratio:.1%} of its parameters. The target answers {c.distillation_texts} prompts, and the draft "
            f"is aligned on these answers, once by KL and once by TVD. Then {c.prompts} held-out prompts are answered with "
            f"gamma = {c.gamma}.\n\n"
            "Acceptance is the sum of min(p, q) on the same answers of the target for all drafts, so the drafts can be paired prompt by "
            "prompt. The tokens a call are noisier; the expected number sums the chances along everything that was drafted and "
            "needs fewer prompts. The formula for independent acceptance is too high: hard places come together, and the last call of "
            "an answer drafts fewer tokens.",
        )
        run.table(
            f"Three drafts, {c.prompts} prompts of {c.tokens} tokens, 95 % intervals over prompts", rows,
            note="Counted: tokens written over calls of the target. Memory-bound: tau / (c gamma + 1) with c the ratio of parameters, the "
            "gain where a call costs the reading of its parameters.",
        )  # fmt: skip
        run.figure("acceptance", _figure(found, c), "Left: the share of calls whose first i proposals were all accepted. Right: tokens a "
                   "call of the TVD draft against gamma, with the formula for independent acceptance at its mean acceptance.")  # fmt: skip
        run.samples(found["samples"], title="Answers of the target, written with the TVD draft")
        self._checks(run, drafts, found)

    def _checks(self, run: Run, drafts: dict[str, dict[str, np.ndarray]], found: dict[str, Any]) -> None:
        for other, least in ((BEFORE, 0.03), (KL, 0.005)):
            gap, p = _paired(drafts[TVD]["acceptance"], drafts[other]["acceptance"])
            run.check(f"acceptance: TVD above {other} by more than {least:g}, p < .001", gap > least and p < 1e-3, f"{gap:+.4f}, p = {p:.1e}")
        gap, p = _paired(drafts[TVD]["tau"], drafts[BEFORE]["tau"])
        run.check("tokens a call: TVD above before, p < .01", gap > 0 and p < 0.01, f"{gap:+.3f}, p = {p:.1e}")
        for name in COLOURS:
            figures = found["figures"][name]
            off = figures["block_efficiency_low_variance"] / figures["block_efficiency"] - 1
            run.check(f"tokens a call, {name}: expected within 4 % of counted", abs(off) < 0.04, f"{off:+.2%}")
        run.check("greedy answers are the target's, letter for letter", found["greedy_equal"], f"{self.config.prompts} answers")
        tau = [found["figures"][name]["block_efficiency"] for name in (BEFORE, TVD)]
        gap, _ = _paired(drafts[TVD]["acceptance"], drafts[BEFORE]["acceptance"])
        run.headline("acceptance gained by TVD", f"{gap:+.3f}", f"from {drafts[BEFORE]['acceptance'].mean():.3f}")
        run.headline("tokens a call", f"{tau[1]:.2f}", f"{tau[0]:.2f} before alignment, at most {self.config.gamma + 1}")


def train_and_decode(c: DraftAlignmentConfig, run: Run) -> dict[str, Any]:
    """The part with letters: target, three drafts, their acceptance and their decoding."""
    import torch

    from fairlead.generation import generate

    from ..speculative import Speculative

    text = letters.corpus()
    cut = int(0.9 * len(text))
    length = PROMPT + c.distillation_tokens
    train = partial(world.fit, seed=run.seed)
    target = train(
        letters.letter_model(c.target_layers, c.target_width, 4, run.seed), world.next_letter_loss(text[:cut], c.batch_size, length), c.target_steps,
        3e-3, tell=partial(run.progress, "target"),
    )  # fmt: skip
    plain = train(
        letters.letter_model(1, c.draft_width, 2, run.seed + 1), world.next_letter_loss(text[:cut], c.batch_size, length), c.draft_steps, 5e-3,
        tell=partial(run.progress, "draft on plain text"),
    )  # fmt: skip

    def windows(start: int, stop: int, count: int, seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return list(text[torch.randint(start, stop - length, (count,), generator=generator)[:, None] + torch.arange(PROMPT)])

    def answers(asked: list[Any], tokens: int) -> Any:
        made = generate(target, None, asked, max_new_tokens=tokens, seed=run.seed, batch_size=256)
        return torch.cat([torch.stack(asked), torch.stack([group[0].ids for group in made])], 1)

    texts = answers(windows(0, cut, c.distillation_texts, run.seed + 2), c.distillation_tokens)
    logits = world.answer_logits(target, texts, PROMPT)
    drafts = {BEFORE: plain}
    for name, kind in ((KL, "kl"), (TVD, "tvd")):
        twin = letters.letter_model(1, c.draft_width, 2, 0)
        twin.load_state_dict(plain.state_dict())
        loss = world.distillation_loss(kind, texts, logits, PROMPT, c.batch_size)
        drafts[name] = train(twin, loss, c.distillation_steps, 5e-3, tell=partial(run.progress, f"alignment by {name}"))

    asked = windows(cut, len(text), c.prompts, run.seed + 3)
    held = answers(asked, c.tokens)
    truth = world.answer_logits(target, held, PROMPT)
    found: dict[str, Any] = {"drafts": {}, "figures": {}, "by_gamma": {}}
    options: dict[str, Any] = {"max_new_tokens": c.tokens, "seed": run.seed, "batch_size": c.prompts}
    for name, draft in drafts.items():
        run.progress("decoding", len(found["drafts"]), len(drafts))
        accepted = world.acceptance(world.answer_logits(draft, held, PROMPT), truth).mean(1)
        made = Speculative(draft=draft, gamma=c.gamma).generate(target, None, asked, **options)
        tau = [g.provenance["expected_tokens"] / g.provenance["target_calls"] for g in made.generations]
        found["drafts"][name] = {"acceptance": accepted.tolist(), "tau": tau}
        found["figures"][name] = made.figures
        found["samples"] = [{"prompt": letters.written(p), "answer": letters.written(g.ids)} for p, g in zip(asked[:12], made.generations, strict=False)]
    for gamma in (1, 2, 3, 6, 8):
        made = Speculative(draft=drafts[TVD], gamma=gamma).generate(target, None, asked, **options)
        found["by_gamma"][str(gamma)] = made.figures["block_efficiency"]
    found["by_gamma"][str(c.gamma)] = found["figures"][TVD]["block_efficiency"]
    greedy = Speculative(draft=drafts[TVD], gamma=c.gamma).generate(target, None, asked, temperature=0.0, **options)
    expected = generate(target, None, asked, temperature=0.0, **options)
    found["greedy_equal"] = all(torch.equal(g.ids, e[0].ids) for g, e in zip(greedy.generations, expected, strict=True))
    with torch.inference_mode():
        rows = text[cut : cut + 128 * (length + 1)].view(128, -1)
        out = target(input_ids=rows[:, :-1], use_cache=False).logits
        found["target_loss"] = float(torch.nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten()))
    return found


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean difference and the one-sided p-value of a paired t-test."""
    from scipy.stats import ttest_rel

    return float((a - b).mean()), float(ttest_rel(a, b, alternative="greater").pvalue)


def _figure(found: dict[str, Any], c: DraftAlignmentConfig) -> Any:
    figure, (left, right) = new_figure(9.2, 3.8, 2)
    places = list(range(1, c.gamma + 1))
    labels = {BEFORE: "plain text only", KL: "aligned by KL", TVD: "aligned by TVD"}
    for name, colour in COLOURS.items():
        left.plot(places, found["figures"][name]["acceptance_by_position"], color=colour, marker="o", label=labels[name])
    left.set(xlabel="position i in the draft", ylabel="share of calls: first i accepted", ylim=(0, 1))
    left.set_xticks(places)
    left.legend(frameon=False, fontsize=8)
    gammas = sorted(int(g) for g in found["by_gamma"])
    mean = float(np.mean(found["drafts"][TVD]["acceptance"]))
    right.plot(gammas, [found["by_gamma"][str(g)] for g in gammas], color=ORANGE, marker="o", label="counted")
    right.plot(gammas, [block_efficiency(mean, g) for g in gammas], color=GREEN, ls="--", label=f"independent, acceptance {mean:.2f}")
    right.plot(gammas, [g + 1 for g in gammas], color=GREY, ls=":", label="everything accepted")
    right.set(xlabel="drafted tokens γ", ylabel="tokens a call of the target", ylim=(1, 1.15 * block_efficiency(mean, max(gammas))))
    right.legend(frameon=False, fontsize=8)
    return figure
