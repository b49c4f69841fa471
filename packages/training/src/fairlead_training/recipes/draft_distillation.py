"""`fairlead run draft-distillation`: does training a draft on TVD, its refusal rate, get more of its tokens accepted than KL?

"Direct Alignment of Draft Model for Speculative Decoding with Chat-Fine-Tuned LLMs" (arXiv 2403.00858) at small scale. Chains
first: the target looks two letters back, the draft one, and every loss is trained to its end. Then letters of real text, with
transformers on both sides, the target's own answers, `DistillationTrainer`, and the decoder `speculative` where one is registered.

Shape suffixes: S contexts (pairs of letters), V letters, N rows, T tokens.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import registry, stats
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe
from fairlead.letters import LETTERS, corpus, letter_model
from fairlead.runs import Run

from ..draft_distillation import DistillationTrainer, acceptance, expected_tokens, make_distillation_set, top_k_targets
from ..objectives.distillation import DISTILLATION

LOSSES = {"fkl": "KL, goes on", "rkl": "reverse KL", "tvd": "TVD", "tvdpp": "TVD++, exact", "tvdpp-sampled": "TVD++, sampled"}
GAMMA = 4
PROMPT = 16
BEFORE, KL, TVD = "before", "KL", "TVD"


class DraftDistillationConfig(MethodConfig):
    """Sizes; the defaults take some seconds on one core."""

    chains: int = Field(5, ge=1, description="chains, seeded 5 seed, 5 seed + 1, ... by default")
    letters: int = Field(12, ge=3, description="letters of a chain")
    steps: int = Field(300, ge=1, description="Adam steps of the warm start by KL, and of each loss after it")
    learning_rate: float = Field(0.05, gt=0, description="learning rate of these steps")
    text: bool = Field(False, description="also the part with transformers on letters of real text, some minutes")
    target_layers: int = Field(3, ge=1, description="layers of the target")
    target_width: int = Field(96, ge=16, multiple_of=16, description="hidden width of the target")
    target_steps: int = Field(500, ge=1, description="training steps of the target, 32 windows of 64 letters each")
    draft_width: int = Field(32, ge=8, multiple_of=8, description="hidden width of the one-layer draft")
    draft_steps: int = Field(1000, ge=1, description="steps of the draft's training on plain text")
    rows: int = Field(1024, ge=32, description="answers of the target that the draft is trained on")
    tokens: int = Field(48, ge=8, description="letters of such an answer, after a prompt of 16")
    distillation_steps: int = Field(1000, ge=1, description="steps of each distillation, 32 rows each")
    prompts: int = Field(128, ge=8, description="held-out prompts")
    answer: int = Field(40, ge=8, description="letters of their answers")


class DraftDistillation(Recipe):
    """KL, reverse KL, TVD and TVD++ on chains; a plain, a KL and a TVD draft on text."""

    Config = DraftDistillationConfig
    config: DraftDistillationConfig

    def __call__(self, run: Run) -> None:
        run.describe("Draft distillation", "Does training a draft on TVD get more of its tokens accepted than KL?", "2403.00858")
        found = []
        for index in range(self.config.chains):
            run.progress("chains", index, self.config.chains)
            found.append(run.stage(f"chain-{index}", partial(chain, self.config, run.seed * self.config.chains + index)))
        report_chains(run, found, self.config)
        if self.config.text:
            report_text(run, run.stage("text", partial(text_experiment, self.config, run)), self.config)


# -- chains ---------------------------------------------------------------------------------------------------------------


def chain(config: DraftDistillationConfig, seed: int) -> dict[str, Any]:
    """Acceptance under the stationary law and tokens a call, after KL and after as many steps of each loss from there."""
    size, generator = config.letters, torch.Generator().manual_seed(seed)
    target_SV, weight_S = draw_chain(size, generator)
    last_S = torch.arange(size).repeat(size)  # all that the draft sees of a pair

    def train(table: torch.Tensor, name: str) -> torch.Tensor:
        table = table.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([table], lr=config.learning_rate)
        more: dict[str, Any] = {"generator": generator} if name == "tvdpp-sampled" else {}
        for _ in range(config.steps):
            optimizer.zero_grad()
            (weight_S * DISTILLATION[name](table[last_S], target_SV, reduction="none", **more)).sum().backward()
            optimizer.step()
        return table.detach()

    warm = train(torch.zeros(size, size, dtype=torch.float64), "fkl")
    tables = {"warm": warm, **{name: train(warm, name) for name in LOSSES}}
    both = {name: torch.minimum(table[last_S].softmax(-1), target_SV.softmax(-1)) for name, table in tables.items()}
    return {
        "seed": seed, "pairs": float(torch.special.entr(weight_S).sum().exp()),
        "acceptance": {name: float(weight_S @ kept.sum(-1)) for name, kept in both.items()},
        "tokens": {name: float(weight_S @ block(kept, GAMMA)) for name, kept in both.items()},
    }  # fmt: skip


def draw_chain(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, V] of letter c after (a, b), 2 N(0, 1) of (b, c) plus 2 N(0, 1) of (a, b, c), and the stationary law [S]."""
    pair_VV = torch.randn(size, size, generator=generator, dtype=torch.float64)
    triple_VVV = torch.randn(size, size, size, generator=generator, dtype=torch.float64)
    logits_SV = (2 * pair_VV + 2 * triple_VVV).flatten(0, 1)
    law_VVV = logits_SV.softmax(-1).view(size, size, size)
    weight_VV = torch.full((size, size), 1 / size**2, dtype=torch.float64)
    for _ in range(500):
        weight_VV = (weight_VV[:, :, None] * law_VVV).sum(0)
    return logits_SV, weight_VV.flatten()


def block(kept_SV: torch.Tensor, gamma: int) -> torch.Tensor:
    """Tokens a call writes from each pair (a, b), exact: 1 + sum_i P(first i accepted), with min(p, q) [S, V] as the step."""
    size = kept_SV.shape[1]
    chance_S = total_S = torch.ones(size**2, dtype=kept_SV.dtype)
    for _ in range(gamma):
        after_VV = chance_S.view(size, size)  # of (b, c)
        chance_S = (kept_SV.view(size, size, size) * after_VV).sum(-1).flatten()
        total_S = total_S + chance_S
    return total_S


def report_chains(run: Run, found: list[dict[str, Any]], config: DraftDistillationConfig) -> None:
    """Table and thresholds of the chains."""

    def column(what: str, name: str) -> np.ndarray:
        return np.array([f[what][name] for f in found])

    gap = column("acceptance", "tvd") - column("acceptance", "fkl")
    apart = np.abs(column("acceptance", "tvdpp") - column("acceptance", "tvd"))
    run.section(
        "A chain and a draft that cannot follow it",
        f"The target looks two letters back, the draft one. After {config.steps} steps of KL each loss has {config.steps} more. KL gains "
        f"{(column('acceptance', 'fkl') - column('acceptance', 'warm')).mean():+.4f}, TVD {gap.mean():+.3f} above it. TVD++ summed over the "
        "whole vocabulary has TVD's gradient divided by sigma, which Adam takes out again; with eight sampled tokens a place it is noisier.",
    )
    run.table(
        f"Acceptance, mean of {config.chains} chains",
        [
            {"loss after the warm start": label, "acceptance": _spread(column("acceptance", name)),
             f"tokens a call, γ = {GAMMA}": _spread(column("tokens", name), 2)}
            for name, label in LOSSES.items()
        ],
        note="Mean, least to largest. Acceptance and tokens a call are exact sums under the chain's stationary law.",
    )  # fmt: skip
    for f in found:
        run.metric("chain acceptance, TVD above KL", f["acceptance"]["tvd"] - f["acceptance"]["fkl"], seed=f["seed"])
    run.check("chains: TVD above KL by more than .02 in every chain", bool((gap > 0.02).all()), ", ".join(f"{g:.4f}" for g in gap))
    run.check("chains: exact TVD++ within .002 of TVD", bool((apart < 0.002).all()), f"largest {apart.max():.1e}")
    run.headline("acceptance on chains, TVD above KL", f"{gap.mean():+.3f}", f"{gap.min():+.3f} to {gap.max():+.3f}")


def _spread(values: np.ndarray, digits: int = 3) -> str:
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


# -- text -----------------------------------------------------------------------------------------------------------------


def text_experiment(c: DraftDistillationConfig, run: Run) -> dict[str, Any]:
    """Acceptance of each held-out prompt's answer and tokens a call, for three drafts."""
    text, length = corpus(), PROMPT + c.tokens
    cut = int(0.9 * len(text))
    target = letter_model(c.target_layers, c.target_width, max(2, c.target_width // 24), run.seed)
    pretrain(target, text[:cut], c.target_steps, 3e-3, length, run.seed, partial(run.progress, "target"))
    drafts = {BEFORE: letter_model(1, c.draft_width, max(2, c.draft_width // 24), run.seed + 1)}
    pretrain(drafts[BEFORE], text[:cut], c.draft_steps, 5e-3, length, run.seed, partial(run.progress, "draft on plain text"))

    def prompts(start: int, stop: int, count: int, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return list(text[torch.randint(start, stop - length, (count,), generator=generator)[:, None] + torch.arange(PROMPT)])

    answered = partial(make_distillation_set, target, None, temperatures=(1.0,), top_p=None, seed=run.seed, batch_size=256)
    rows = answered(prompts(0, cut, c.rows, run.seed + 2), max_new_tokens=c.tokens)
    rows = top_k_targets(target, rows, len(LETTERS), batch_size=128)  # all letters: the whole law, once for every epoch and loss
    asked = prompts(cut, len(text), c.prompts, run.seed + 3)
    held = answered(asked, max_new_tokens=c.answer)
    from transformers import PrinterCallback

    for name, loss in ((KL, "fkl"), (TVD, "tvd")):
        run.progress(f"distillation by {name}", 0)
        drafts[name] = copy.deepcopy(drafts[BEFORE])
        with tempfile.TemporaryDirectory() as folder:
            trainer = DistillationTrainer(drafts[name], None, arguments(folder, c.distillation_steps, run.seed), rows, loss=loss)
            trainer.remove_callback(PrinterCallback)  # standard output is the recipe's
            trainer.train()
        drafts[name].eval()
    found: dict[str, Any] = {"acceptance": {}, "tokens": {}, "counted": {}, "calls_by": "", "parameters": {}}
    decodes = any(m.name == "speculative" for m in registry.methods("decoder"))
    for name, draft in drafts.items():
        run.progress("measuring", len(found["tokens"]), len(drafts))
        found["acceptance"][name] = acceptance(draft, target, held).tolist()
        found["parameters"][name] = sum(p.numel() for p in draft.parameters())
        if decodes:
            decoder = registry.create("decoder", "speculative", draft=draft, gamma=GAMMA)
            made = decoder.generate(target, None, asked, max_new_tokens=c.answer, seed=run.seed, batch_size=c.prompts)
            found["tokens"][name] = [g.provenance["expected_tokens"] / g.provenance["target_calls"] for g in made.generations]
            found["counted"][name] = [made.figures["block_efficiency"], made.figures["block_efficiency_low_variance"]]
        else:
            whole = [torch.tensor(row["prompt_ids"] + row["completion_ids"][0]) for row in held]
            places = range(PROMPT, PROMPT + c.answer - GAMMA, 4)
            each = expected_tokens(draft, target, [ids[:p] for ids in whole for p in places], gamma=GAMMA, seed=run.seed)
            found["tokens"][name] = each.view(len(whole), -1).mean(1).tolist()
    found["parameters"]["target"] = sum(p.numel() for p in target.parameters())
    return found


def report_text(run: Run, found: dict[str, Any], c: DraftDistillationConfig) -> None:
    """Table and thresholds of the text."""
    accepted = {name: np.array(v) for name, v in found["acceptance"].items()}
    tokens = {name: np.array(v) for name, v in found["tokens"].items()}
    ratio = found["parameters"][TVD] / found["parameters"]["target"]
    counted = found["counted"]
    run.section(
        "Letters of real text",
        f"A transformer learns the docstrings of Python's standard library letter by letter; the draft has {ratio:.1%} of its parameters. The "
        f"target answers {c.rows} prompts, and the draft is trained on the answers, once by KL and once by TVD. Acceptance is the sum of "
        f"min(p, q) on the same {c.prompts} held-out answers of the target for all drafts. "
        + ("Tokens a call come from speculative decoding of the held-out prompts." if counted else
           "No decoder named speculative is registered: tokens a call are those of drafts from places of the held-out answers, and are not counted."),
    )  # fmt: skip
    run.table(
        f"Three drafts, {c.prompts} prompts, 95 % intervals",
        [
            {"draft": {BEFORE: "plain text only", KL: "distilled by KL", TVD: "distilled by TVD"}[name], "acceptance": str(stats.mean(accepted[name])),
             f"tokens a call, γ = {GAMMA}, low variance": str(stats.mean(tokens[name])), "counted": f"{counted[name][0]:.3f}" if counted else ""}
            for name in (BEFORE, KL, TVD)
        ],
        note="Low variance: 1 + sum_i prod_(j <= i) min(1, q_j / p_j) along each drafted path, mean over the calls of a prompt.",
    )  # fmt: skip
    for name in (BEFORE, KL, TVD):
        run.metric("acceptance on text", float(accepted[name].mean()), draft=name)
    for other, least in ((BEFORE, 0.03), (KL, 0.005)):
        gap, p = _paired(accepted[TVD], accepted[other])
        run.check(f"text: acceptance, TVD above {other} by more than {least:g}, p < .001", gap > least and p < 1e-3, f"{gap:+.4f}, p = {p:.1e}")
    gap, p = _paired(tokens[TVD], tokens[BEFORE])
    run.check("text: tokens a call, TVD above before, p < .01", gap > 0 and p < 0.01, f"{gap:+.3f}, p = {p:.1e}")
    for name, (plain, low) in counted.items():
        run.check(f"text: tokens a call of {name}, low variance within 4 % of counted", abs(low / plain - 1) < 0.04, f"{low / plain - 1:+.2%}")
    gap, _ = _paired(accepted[TVD], accepted[BEFORE])
    run.headline("acceptance on text, gained by TVD", f"{gap:+.3f}", f"from {accepted[BEFORE].mean():.3f}; KL {(accepted[KL] - accepted[BEFORE]).mean():+.3f}")


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean difference and the one-sided p-value of a paired t-test."""
    from scipy.stats import ttest_rel

    return float((a - b).mean()), float(ttest_rel(a, b, alternative="greater").pvalue)


def pretrain(model: Any, text: torch.Tensor, steps: int, rate: float, length: int, seed: int, tell: Callable[[int, int], None]) -> None:
    """Next-letter loss on random windows, with a warm-up and a cosine; leaves the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        starts = torch.randint(0, len(text) - length - 1, (32,), generator=generator)
        windows = text[starts[:, None] + torch.arange(length + 1)]
        optimizer.zero_grad()
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            tell(step, steps)
    model.eval()


def arguments(folder: str, steps: int, seed: int) -> Any:
    """TrainingArguments of one distillation."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3, weight_decay=0.01, lr_scheduler_type="cosine",
        warmup_steps=steps // 10, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=seed, data_seed=seed,
    )  # fmt: skip
