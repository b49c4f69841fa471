"""`fairlead run gradient-entanglement`: chosen and rejected log-probabilities fall together, and what keeps them apart.

"A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement" (arXiv 2410.13828) on a tiny Llama: a short
supervised phase, then DPO by plain steps, and the same steps along the difference of the unit gradients of mean s_w and
mean s_l. Pairs that differ in their first token only show how a shared suffix entangles them; a long rejected answer shows
the pitfall.

Shape suffixes: P pairs, B sequences (all chosen, then all rejected), T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.runs import Run

from ..entanglement import entanglement

VOCABULARY, PROMPT, CHAIN = 64, 6, 60
SUFFIXES = (0, 4, 16)
TRAINED = 4
METHODS = ("dpo", "normalised")
LENGTHS = {"long rejected": (4, 16), "long chosen": (16, 4), "equal": (8, 8)}


class GradientEntanglementConfig(MethodConfig):
    """Sizes; the defaults take less than a minute on one core."""

    models: int = Field(1, ge=1, description="toy models, each with a seed of its own: the run's seed by default")
    pairs: int = Field(64, ge=2, description="pairs of a training, all in every step")
    sft_steps: int = Field(60, ge=0, description="supervised steps before pairs with a shared suffix")
    steps: int = Field(30, ge=1, description="steps on pairs with a shared suffix")
    learning_rate: float = Field(0.02, gt=0, description="learning rate there")
    text_sft_steps: int = Field(4, ge=0, description="supervised steps before pairs from the Markov chain")
    text_steps: int = Field(15, ge=1, description="steps on pairs from the Markov chain")
    text_learning_rate: float = Field(0.1, gt=0, description="learning rate there")
    beta: float = Field(0.1, gt=0, description="beta of DPO")


class Pairs(NamedTuple):
    """ids: int64 [B, T], padded on the right. length: tokens of each answer, int64 [B]."""

    ids: torch.Tensor
    length: torch.Tensor


class GradientEntanglement(Recipe):
    """DPO and its normalised steps, on pairs with a shared suffix and on pairs of unequal length."""

    Config = GradientEntanglementConfig
    config: GradientEntanglementConfig

    def __call__(self, run: Run) -> None:
        run.describe("Gradient entanglement", "Why DPO lowers the chosen answers with the rejected ones, and steps that do not.", "2410.13828")
        rows = []
        for index in range(self.config.models):
            run.progress("models", index, self.config.models)
            rows += run.stage(f"model-{index}", partial(measure, self.config, run.seed * self.config.models + index))
        run.progress("models", self.config.models, self.config.models)
        report(run, rows)


def measure(config: GradientEntanglementConfig, seed: int) -> list[dict[str, Any]]:
    """Every quantity of one seed: ratios with a shared suffix, changes by DPO and by normalised steps."""
    rows: list[dict[str, Any]] = []
    for t in SUFFIXES:
        rng = torch.Generator().manual_seed(seed)
        draw = partial(suffix_pairs, t=t, rng=rng)
        model = supervised(draw, config.sft_steps, seed)
        pairs = draw(config.pairs)
        row = {"seed": seed, "setting": f"suffix {t}", **looked_at(model, pairs, config.beta)}
        if t == TRAINED:
            for name in METHODS:
                row |= trained(name, model, pairs, config.beta, config.steps, config.learning_rate)
        rows.append(row)
    for name, lengths in LENGTHS.items():
        rng = torch.Generator().manual_seed(seed)
        draw = partial(text_pairs, chain=chain(rng), lengths=lengths, rng=rng)
        model = supervised(draw, config.text_sft_steps, seed)
        pairs = draw(config.pairs)
        row = {"seed": seed, "setting": name, **looked_at(model, pairs, config.beta)}
        for method in METHODS if name == "long rejected" else ("dpo",):
            steps = 1 if name == "long chosen" else config.text_steps
            row |= trained(method, model, pairs, config.beta, steps, config.text_learning_rate)
        rows.append(row)
    return rows


def suffix_pairs(count: int, t: int, rng: torch.Generator) -> Pairs:
    """Random prompts; answers 1 (chosen) or 2 (rejected) and then the same t random tokens."""
    prompt, tail = (torch.randint(3, VOCABULARY, (count, n), generator=rng) for n in (PROMPT, t))
    first = torch.ones(count, 1, dtype=torch.int64)
    return Pairs(torch.cat([torch.cat([prompt, k * first, tail], 1) for k in (1, 2)]), torch.full((2 * count,), 1 + t))


def chain(rng: torch.Generator) -> torch.Tensor:
    """Transition probabilities [60, 60] of a Markov chain, rows Dirichlet(0.3)."""
    drawn = torch._standard_gamma(torch.full((CHAIN, CHAIN), 0.3), generator=rng)
    return drawn / drawn.sum(1, keepdim=True)


def text_pairs(count: int, chain: torch.Tensor, lengths: tuple[int, int], rng: torch.Generator) -> Pairs:
    """Prompts of the chain; answers of a random first token, different in each pair, and then the chain from the prompt's last
    token, the same for both as far as the shorter one goes."""
    text = [torch.randint(0, CHAIN, (count,), generator=rng)]
    for _ in range(PROMPT - 1 + max(lengths)):
        text.append(torch.multinomial(chain[text[-1]], 1, generator=rng).squeeze(1))
    line = torch.stack(text, 1)
    prompt, tail = line[:, :PROMPT], line[:, PROMPT:]
    first = torch.randint(0, CHAIN, (count,), generator=rng)
    other = (first + torch.randint(1, CHAIN, (count,), generator=rng)) % CHAIN
    sides = []
    for start, length in zip((first, other), lengths, strict=True):
        kept = torch.where(torch.arange(max(lengths)) < length, tail, 0)
        sides.append(torch.cat([prompt, start[:, None], kept], 1))
    return Pairs(torch.cat(sides), 1 + torch.tensor(lengths).repeat_interleave(count))


def supervised(draw: Callable[[int], Pairs], steps: int, seed: int) -> Any:
    """A tiny Llama after AdamW steps on 64 fresh answers each, half of them chosen, half rejected."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = draw(32)
        optimizer.zero_grad()
        (-logps(model, batch).sum() / batch.length.sum()).backward()
        optimizer.step()
    return model.eval()


def logps(model: Any, pairs: Pairs) -> torch.Tensor:
    """Log-probability of each answer, [B]."""
    logits_BTV = model(input_ids=pairs.ids, use_cache=False).logits[:, PROMPT - 1 : -1]
    answer_BT = pairs.ids[:, PROMPT:]
    token_BT = logits_BTV.log_softmax(-1).gather(-1, answer_BT[:, :, None]).squeeze(-1)
    return torch.where(torch.arange(answer_BT.shape[1]) < pairs.length[:, None], token_BT, 0).sum(1)


def looked_at(model: Any, pairs: Pairs, beta: float) -> dict[str, float]:
    """Ratios and angles of the first step: of single pairs on average, and of the batch."""
    count = len(pairs.ids) // 2
    with torch.no_grad():
        reference = logps(model, pairs).tolist()
    answers = [ids[PROMPT : PROMPT + n] for ids, n in zip(pairs.ids.tolist(), pairs.length.tolist(), strict=True)]
    rows = [
        {"prompt_ids": pairs.ids[i, :PROMPT].tolist(), "completion_ids": [answers[i], answers[i + count]], "role": [1, -1], "ref_logp": [reference[i], reference[i + count]]}
        for i in range(count)
    ]
    found = entanglement(model, rows, registry.create("objective", "dpo", beta=beta)).record()
    whole = {name: found[name] for name in ("ratio_min", "cos", "pair_ratio_min", "pair_cos", "predicted_ds_w", "predicted_ds_l")}
    return {**whole, "r_star": found["norm_l"] / found["norm_w"]}


def trained(method: str, start: Any, pairs: Pairs, beta: float, steps: int, learning_rate: float) -> dict[str, float]:
    """Changes of mean s_w and mean s_l after plain full-batch steps of DPO, or after as many normalised ones."""
    count = len(pairs.ids) // 2
    objective, model = registry.create("objective", "dpo", beta=beta), copy.deepcopy(start)
    with torch.no_grad():
        reference = logps(start, pairs)
    columns: dict[str, Any] = {"ref_logp": reference, "group": torch.arange(2 * count) % count, "role": torch.tensor([1] * count + [-1] * count)}
    parameters = list(model.parameters())
    for _ in range(steps):
        logp_B = logps(model, pairs)
        loss = objective(SequenceStats(logp_B, pairs.length, **columns)).loss
        move = [-g for g in torch.autograd.grad(loss, parameters, retain_graph=method == "normalised")]
        if method == "normalised":
            move = normalised(logp_B, parameters, norm(move))
        with torch.no_grad():
            for parameter, change in zip(parameters, move, strict=True):
                parameter += learning_rate * change
    with torch.no_grad():
        change_B = logps(model, pairs) - reference
    return {f"{method}_w": float(change_B[:count].mean()), f"{method}_l": float(change_B[count:].mean())}


def normalised(logp_B: torch.Tensor, parameters: list[torch.Tensor], length: float) -> list[torch.Tensor]:
    """A step along g_w/|g_w| - g_l/|g_l| of the batch's mean log-probabilities, as long as another."""
    g_w, g_l = (torch.autograd.grad(side.mean(), parameters, retain_graph=True) for side in logp_B.chunk(2))
    norm_w, norm_l = norm(g_w), norm(g_l)
    move = [a / norm_w - b / norm_l for a, b in zip(g_w, g_l, strict=True)]
    scale = length / norm(move)
    return [scale * part for part in move]


def norm(parts: Any) -> float:
    """Length of a gradient that is kept by parameter."""
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())


def report(run: Run, rows: list[dict[str, Any]]) -> None:
    """Tables and thresholds."""

    def column(setting: str, name: str) -> np.ndarray:
        return np.array([row[name] for row in rows if row["setting"] == setting])

    for row in rows:
        for name in ("pair_ratio_min", "ratio_min", "dpo_w", "dpo_l", "normalised_w", "normalised_l"):
            if name in row:
                run.metric(name, row[name], seed=row["seed"], setting=row["setting"])
    down, up = column("long rejected", "dpo_w"), column("long rejected", "normalised_w")
    run.section(
        "Together or apart",
        "A pair that differs in one token is pulled apart. Each shared token behind it adds to all three inner products and brings the "
        "ratio of a pair near one; the ratio of the batch is another number, because what the pairs share averages out.\n\n"
        f"With a long rejected answer DPO changes the chosen log-probability by {down.mean():+.2f}: both fall. Steps of the same length "
        f"along the difference of the unit gradients change it by {up.mean():+.2f}.",
    )
    figure(run, rows)
    shown = {"pair ratio": "pair_ratio_min", "batch ratio": "ratio_min", "batch cosine": "cos", "norms, rejected / chosen": "r_star"}
    run.table(
        "Gradients before the first step",
        [{"seed": row["seed"], "setting": row["setting"], **{k: f"{row[v]:.3f}" for k, v in shown.items()}} for row in rows],
        note="Ratio: inner product over the smaller squared norm; the mean over pairs, and that of the batch's gradients.",
    )
    run.table(
        "Change of the mean log-probability, chosen / rejected",
        [
            {"seed": row["seed"], "setting": row["setting"], **{m: f"{row[f'{m}_w']:+.2f} / {row[f'{m}_l']:+.2f}" for m in METHODS if f"{m}_w" in row}}
            for row in rows if "dpo_w" in row
        ],
        ["seed", "setting", *METHODS], note="Long chosen: after one step.",
    )  # fmt: skip
    for t, holds, limit in ((0, np.less, 0.0), (4, np.greater, 0.65), (16, np.greater, 0.9)):
        ratio = column(f"suffix {t}", "pair_ratio_min")
        run.check(f"{t} shared tokens: mean ratio of a pair {'below' if t == 0 else 'above'} {limit:g}", bool(holds(ratio, limit).all()), _list(ratio))
    gain = column("suffix 4", "normalised_w") - column("suffix 4", "dpo_w")
    run.check("4 shared tokens: normalised steps raise the chosen by more than .1 over DPO", bool((gain > 0.1).all()), _list(gain))
    lost = column("long rejected", "dpo_l")
    run.check("long rejected, DPO: chosen below -.3, rejected below -2", bool((down < -0.3).all() and (lost < -2).all()), f"{_list(down)}; {_list(lost)}")
    lost = column("long rejected", "normalised_l")
    run.check("long rejected, normalised: chosen above +.5, rejected below -1", bool((up > 0.5).all() and (lost < -1).all()), f"{_list(up)}; {_list(lost)}")
    w, l = column("equal", "dpo_w"), column("equal", "dpo_l")  # noqa: E741
    run.check("equal lengths, DPO: chosen rises, rejected falls", bool((w > 0).all() and (l < 0).all()), f"{_list(w)}; {_list(l)}")
    run.headline("chosen log-probability, DPO", f"{down.mean():+.2f}", f"{_list(down)}; long rejected answers")
    run.headline("chosen log-probability, normalised", f"{up.mean():+.2f}", f"{_list(up)}; the same pairs")


def figure(run: Run, rows: list[dict[str, Any]]) -> None:
    """Change of chosen against change of rejected."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5, 3.8), layout="constrained")
    axis = drawn.subplots()
    for setting, marker in (("suffix 4", "o"), ("long rejected", "s"), ("equal", "^")):
        for method, colour in zip(METHODS, ("tab:red", "tab:blue"), strict=True):
            points = [(row[f"{method}_l"], row[f"{method}_w"]) for row in rows if row["setting"] == setting and f"{method}_w" in row]
            if points:
                axis.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=f"{setting}, {method}")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="change of rejected", ylabel="change of chosen")
    axis.legend(frameon=False, fontsize=8)
    run.figure("changes", drawn, "Change of the mean log-probabilities. Apart is the upper left quarter; the lower left is the pitfall.")


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{v:.3f}" for v in values)
