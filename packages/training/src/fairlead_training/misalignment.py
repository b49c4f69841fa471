"""The (mis)alignment matrix (arXiv 2604.07754): fine-tune a model towards unsafe answers, realign it, for every pair of methods.

M1 = Mis(M0, a), M2 = Re(M1, b), with unsafety, utility and cost of each. Every stage starts from merged weights; the
reference of DPO is the model at the start of the stage. Methods are adapters.py's, verdicts judging.py's. Rows are
token ids, so that a chat template is the caller's explicit choice. Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fairlead import registry
from fairlead.errors import InputError
from fairlead.kinds import SequenceStats
from fairlead.logprobs import completion_logprobs

from .adapters import NF4, Backend, FineTuning, method_of, orthogonality, quantise_base, trainable_in_4_bits

Evaluate = Callable[[Any], dict[str, Any]]
Stage = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Pair:
    """One training row as token ids: the prompt, the wanted answer and, for preference objectives, the unwanted one."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int] | None = None


@dataclass(frozen=True)
class Budget:
    """What every method may spend: steps of batch_size rows (0: all rows), and its learning rates.

    lrs: methods' learning rates by name; a list of several is swept (equal tuning: every method must then have as many),
    and the best by `misalign`'s select is kept. A method without an entry uses its own.
    """

    steps: int = 30
    batch_size: int = 0
    lrs: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def of(self, method: FineTuning) -> Sequence[float]:
        """The learning rates to try."""
        return self.lrs.get(method.name, self.lrs.get("*", (method.lr,)))

    @property
    def label(self) -> str:
        """What the table prints."""
        tries = max((len(v) for v in self.lrs.values()), default=1)
        return f"{self.steps} steps" + (f", {tries} learning rates each" if tries > 1 else "")


def train_stage(
    model: Any, method: FineTuning | str, rows: Sequence[Pair], *, steps: int, lr: float | None = None, batch_size: int = 0, seed: int = 0,
    backend: Backend = "auto", levels: tuple[float, ...] = NF4,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Fine-tune a copy of the model and merge: (model, cost and losses). `model` is left as it was.

    InputError where there are no rows, or a preference objective meets a row without a rejected answer.
    """
    method = method_of(method) if isinstance(method, str) else method
    if not rows or steps < 0:
        raise InputError(f"{method.name}: needs rows and steps of at least 0, got {len(rows)} rows and {steps} steps")
    for number, row in enumerate(rows):
        if method.pairs and row.rejected is None:
            raise InputError(f"{method.name}: row {number} has no rejected answer, which a preference objective needs")
    torch.manual_seed(seed)
    base = copy.deepcopy(model)
    trainable_in_4_bits(base)
    began = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    quantised = quantise_base(base, backend, levels) if method.quantised and steps else ""
    policy, adapted = base, method.adapter is not None
    if method.adapter is not None:
        from peft import get_peft_model

        policy = get_peft_model(base, method.adapter(steps))
    else:
        base.requires_grad_(True)
    losses = _loop(policy, method, rows, steps, lr or method.lr, batch_size, seed)
    cost = {
        "train_seconds": time.monotonic() - began, "steps": steps, "lr": lr or method.lr, "losses": losses, "quantised": quantised,
        "peak_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "trainable_params": sum(p.numel() for p in policy.parameters() if p.requires_grad),
    }  # fmt: skip
    merged = policy.merge_and_unload() if adapted else policy
    return merged.eval().requires_grad_(False), cost


def _loop(policy: Any, method: FineTuning, rows: Sequence[Pair], steps: int, lr: float, batch_size: int, seed: int) -> list[float]:
    ada = "AdaLora" in type(getattr(policy, "base_model", None)).__name__
    objective = registry.create("objective", method.objective, **method.objective_settings)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=lr, weight_decay=method.weight_decay)
    ramp = max(1, round(method.warmup * steps))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / ramp))
    size = batch_size or len(rows)
    order = torch.Generator().manual_seed(seed)
    reference = _reference(policy, rows) if "ref_logp" in objective.needs and steps else None
    losses: list[float] = []
    queue: list[int] = []
    for step in range(steps):
        if len(queue) < size:
            queue += torch.randperm(len(rows), generator=order).tolist() if size < len(rows) else list(range(len(rows)))
        batch, queue = queue[:size], queue[size:]
        policy.train()
        stats_S = sequence_batch(policy, [rows[i] for i in batch], method.pairs)
        if reference is not None:
            stats_S = replace(stats_S, ref_logp=reference[batch].reshape(-1))
        loss = objective(stats_S).loss
        (loss + orthogonality(policy) if ada else loss).backward()
        optimizer.step()
        if ada:
            policy.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        warm.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def _reference(policy: Any, rows: Sequence[Pair]) -> torch.Tensor:
    """Log-probabilities of (chosen, rejected) under the model at the start of the stage, [rows, 2], adapter disabled."""
    policy.eval()
    off = policy.disable_adapter() if hasattr(policy, "disable_adapter") else None
    if off is None:
        return sequence_batch(policy, rows, True).logp.reshape(-1, 2)
    with off:
        return sequence_batch(policy, rows, True).logp.reshape(-1, 2)


def sequence_batch(model: Any, rows: Sequence[Pair], pairs: bool) -> SequenceStats:
    """Log-probabilities of each row's chosen (and rejected) answer, in row order, with the gradient."""
    answers = [(i, row.prompt, a, role) for i, row in enumerate(rows) for a, role in ((row.chosen, 1), (row.rejected, -1)) if role > 0 or pairs]
    width = max(len(p) + len(a or ()) for _, p, a, _ in answers)
    ids_BT = torch.zeros(len(answers), width, dtype=torch.int64)
    real_BT, scored_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for row, (_, prompt, answer, _) in enumerate(answers):
        whole = [*prompt, *(answer or ())]
        ids_BT[row, : len(whole)] = torch.tensor(whole)
        real_BT[row, : len(whole)] = 1  # ones, not ids: an attention mask says what is there
        scored_BT[row, len(prompt) : len(whole)] = 1
    device = next(model.parameters()).device
    found = completion_logprobs(model, ids_BT.to(device), real_BT.to(device), scored_BT.to(device))
    return SequenceStats(
        logp=found.sum_B, length=found.count_B, group=torch.tensor([a[0] for a in answers]), role=torch.tensor([a[3] for a in answers])
    )


def run_matrix(
    model: Any, misalign_rows: Sequence[Pair], realign_sets: Mapping[str, Sequence[Pair]], methods: Sequence[str], evaluate: Evaluate, *,
    realign_methods: Sequence[str] | None = None, rounds: int = 1, misalign_budget: Budget | None = None, realign_budget: Budget | None = None,
    select: Callable[[dict[str, Any], str], float] | None = None, seed: int = 0, stage: Stage | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The tidy table: one row per model of each round (M0; M1 per method; M2 per method, realignment method and data).

    evaluate: model -> columns (unsafety, unsafety_ci, utility_<name>, ...); asked once a cell. In later rounds every M2 is
    misaligned again by the method that misaligned it first, and realigned by the one that realigned it. stage(name, work):
    keeps results (`Run.stage`); a cell that is kept is neither trained nor evaluated again unless a later cell needs its
    weights. select(result, "misalign" or "realign"): what a sweep of learning rates maximises; default unsafety, or its negative.
    """
    first, second = misalign_budget or Budget(), realign_budget or Budget()
    keep: Stage = stage or (lambda name, work: work())
    chosen = select or (lambda found, kind: float(found["unsafety"]) if kind == "misalign" else -float(found["unsafety"]))
    attack = [method_of(n) for n in methods]
    defend = attack if realign_methods is None else [method_of(n) for n in realign_methods]
    table: list[dict[str, Any]] = []

    def cell(name: str, parent: Callable[[], Any], method: FineTuning, rows: Sequence[Pair], budget: Budget, kind: str, **names: Any) -> Callable[[], Any]:
        def trained(lr: float) -> tuple[Any, dict[str, Any]]:
            return train_stage(parent(), method, rows, steps=budget.steps, lr=lr, batch_size=budget.batch_size, seed=seed)

        def work(lr: float) -> dict[str, Any]:
            made, cost = trained(lr)
            fresh.append(made)
            return _summary(evaluate(made)) | {k: v for k, v in cost.items() if k != "losses"}

        best: dict[str, Any] | None = None
        kept: Any = None
        for lr in budget.of(method):
            fresh: list[Any] = []  # stays empty where the result was kept by an earlier run
            found = keep(f"{name}-lr{lr:g}", partial(work, lr))
            if best is None or chosen(found, kind) > chosen(best, kind):
                best, kept = found, fresh[0] if fresh else None
        assert best is not None
        table.append({**names, **best, "budget": budget.label, "seed": seed})
        rate = best["lr"]

        def weights() -> Any:
            nonlocal kept
            if kept is None:
                kept = trained(rate)[0]
            return kept

        return weights

    def descend(number: int, parent: Callable[[], Any], a: str, b: str = "", d: str = "") -> None:
        """A round from one model on, and the rounds after it: depth first, so that few models are alive at a time."""
        label = {"round": number, "model": f"M{2 * number - 1}", "misalign_method": a, "realign_method": b, "realign_data": d}
        name = f"M{2 * number - 1}-{a}" + (f"-{b}-{d}" if b else "")
        attacked = cell(name, parent, method_of(a), misalign_rows, first, "misalign", **label)
        for to, data in [(b, d)] if b else [(m.name, data) for m in defend for data in realign_sets]:
            label = {"round": number, "model": f"M{2 * number}", "misalign_method": a, "realign_method": to, "realign_data": data}
            realigned = cell(f"M{2 * number}-{a}-{to}-{data}", attacked, method_of(to), realign_sets[data], second, "realign", **label)
            if number < rounds:
                descend(number + 1, realigned, a, to, data)

    table.append({"round": 0, "model": "M0", "misalign_method": "", "realign_method": "", "realign_data": "",
                  **keep("M0", lambda: _summary(evaluate(model))), "steps": 0, "budget": "", "seed": seed})  # fmt: skip
    for method in attack:
        descend(1, lambda: model, method.name)
    return sorted(table, key=lambda row: int(row["model"][1:]))


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    utilities = [float(v) for k, v in found.items() if k.startswith("utility_")]
    return found | ({"utility_mean": sum(utilities) / len(utilities)} if utilities else {})
