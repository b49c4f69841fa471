"""Gradient entanglement (arXiv 2410.13828): why chosen and rejected log-probabilities fall, or rise, together.

A step of a loss with weights d_w and d_l moves theta by eta (d_w g_w - d_l g_l), so to first order
    ds_w = eta (d_w |g_w|^2 - d_l <g_w, g_l>),   ds_l = eta (d_w <g_w, g_l> - d_l |g_l|^2):
each of the two is coupled to the other's gradient. `entanglement` says for some pairs what a step would do;
`EntanglementMonitor` says so during training, beside what the optimiser's step did. Inner products are pair_gradients.py's,
remedies pair_weights.py's.

Shape suffixes: S sequences, P pairs.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fairlead import registry
from fairlead.errors import InputError
from fairlead.files import atomic_write
from fairlead.kinds import Objective

from .pair_gradients import Probe, Select
from .statistics import Row, assemble

log = logging.getLogger("fairlead")
FILE = "entanglement.jsonl"
MOST_PAIRS = 8
MEANING = {
    "apart": "chosen rises and rejected falls",
    "both falling": "chosen falls with rejected; the margin grows only because rejected falls more",
    "both rising": "rejected rises with chosen; the margin grows only because chosen rises more",
    "reversed": "chosen falls and rejected rises",
    "still": "neither moves",
}


@dataclass(frozen=True)
class Coupling:
    """Gradients of a chosen and a rejected log-probability, and the weights with which a loss pulls at them.

    dot: <g_w, g_l>. norm_w, norm_l: |g_w|, |g_l|. d_w = -dL/ds_w, d_l = dL/ds_l.
    """

    dot: float
    norm_w: float
    norm_l: float
    d_w: float = 1.0
    d_l: float = 1.0

    @property
    def degenerate(self) -> bool:
        """Whether a gradient is zero, so that cosine and ratio are NaN."""
        return not (self.norm_w > 0 and self.norm_l > 0)

    @property
    def cos(self) -> float:
        """Cosine of the gradients."""
        return math.nan if self.degenerate else self.dot / (self.norm_w * self.norm_l)

    @property
    def ratio_min(self) -> float:
        """<g_w, g_l> / min(|g_w|^2, |g_l|^2): a loss with d_w = d_l moves the two apart up to 1."""
        return math.nan if self.degenerate else self.dot / min(self.norm_w, self.norm_l) ** 2

    @property
    def r(self) -> float:
        """d_w / d_l; infinite for a loss that pulls at the chosen sequence alone."""
        return self.d_w / self.d_l if self.d_l else math.copysign(math.inf, self.d_w) if self.d_w else math.nan

    @property
    def band(self) -> tuple[float, float]:
        """The r that move the two apart, (cos |g_l|/|g_w|, |g_l|/(|g_w| cos)); all of them where cos <= 0. For d_w, d_l > 0."""
        if self.degenerate:
            return math.nan, math.nan
        return (self.cos * self.norm_l / self.norm_w, self.norm_l / (self.norm_w * self.cos)) if self.cos > 0 else (0.0, math.inf)

    @property
    def ds_w(self) -> float:
        """Change of the chosen log-probability by a plain gradient step, per unit of the learning rate."""
        return self.d_w * self.norm_w**2 - self.d_l * self.dot

    @property
    def ds_l(self) -> float:
        """The same of the rejected one."""
        return self.d_w * self.dot - self.d_l * self.norm_l**2

    @property
    def inside_band(self) -> bool:
        """Whether such a step lowers no chosen and raises no rejected log-probability."""
        if self.degenerate or self.d_w <= 0 or self.d_l <= 0:
            return self.ds_w >= 0 and self.ds_l <= 0
        return self.band[0] <= self.r <= self.band[1]

    def record(self, learning_rate: float = 1.0) -> dict[str, Any]:
        """All of it by name, predictions for a step of this learning rate."""
        low, high = self.band
        return {
            "dot": self.dot, "norm_w": self.norm_w, "norm_l": self.norm_l, "cos": self.cos, "ratio_min": self.ratio_min, "d_w": self.d_w,
            "d_l": self.d_l, "r": self.r, "band_low": low, "band_high": high, "inside_band": self.inside_band,
            "predicted_ds_w": learning_rate * self.ds_w, "predicted_ds_l": learning_rate * self.ds_l, "degenerate": self.degenerate,
        }  # fmt: skip


@dataclass(frozen=True)
class Entanglement:
    """whole: gradients of mean s_w and mean s_l with the mean weights. pairs: each pair with its own. layers: the share of each group
    of parameters in the whole. mean_w, mean_l: mean s_w and mean s_l."""

    whole: Coupling
    pairs: list[Coupling]
    layers: dict[str, Coupling]
    mean_w: float
    mean_l: float

    def record(self, learning_rate: float = 1.0) -> dict[str, Any]:
        """The whole, with the means over single pairs: their ratio is not the ratio of the batch."""
        sound = [pair for pair in self.pairs if not pair.degenerate]
        return {
            **self.whole.record(learning_rate), "s_w": self.mean_w, "s_l": self.mean_l, "pairs": len(self.pairs),
            "pair_cos": _mean([p.cos for p in sound]), "pair_ratio_min": _mean([p.ratio_min for p in sound]),
            "pairs_inside": _mean([float(p.inside_band) for p in self.pairs]),
            "layers": {n: {k: getattr(c, k) for k in ("dot", "norm_w", "norm_l", "cos", "ratio_min", "ds_w", "ds_l")} for n, c in self.layers.items()},
        }  # fmt: skip


def entanglement(model: Any, rows: Sequence[Row] | Probe, objective: str | Objective = "dpo", params: str | Select | None = "all") -> Entanglement:
    """What a gradient step of an objective on these pairs does to them, to first order.

    rows: tokenised rows of pairs, with `ref_logp` where the objective needs it, or a Probe. objective: one of pairs, or its name.
    params: "lora", "head" (no backward pass), "all", a regular expression or a function; see `pair_gradients.selected`.
    InputError for rows that are no pairs, and for parameters that do not exist or are frozen.
    """
    judge: Objective = objective if isinstance(objective, Objective) else registry.create("objective", objective)
    probe = rows if isinstance(rows, Probe) else Probe(model, rows, judge, params)
    found, count = probe.products(), len(probe.rows)
    stats = assemble(found.stats, probe.rows, judge, tokens="token_logp" in judge.needs)
    training, judge.training = judge.training, False
    try:
        dlogp_S = judge(stats).dlogp.double().cpu()
    finally:
        judge.training = training
    d_w, d_l = (-count * dlogp_S[probe.chosen_P]).tolist(), (count * dlogp_S[probe.rejected_P]).tolist()
    own = [_coupling(p, *d) for p, *d in zip(found.pairs, d_w, d_l, strict=True)]
    mean = sum(d_w) / count, sum(d_l) / count
    layers = {name: _coupling(p, *mean) for name, p in found.layers.items()}
    parts = [sum(p[k] for p in found.layers.values()) for k in range(3)]
    mean_w, mean_l = _means(stats.logp, probe)
    return Entanglement(_coupling((parts[0], parts[1], parts[2]), *mean), own, layers, mean_w, mean_l)


class EntanglementMonitor(TrainerCallback):
    """Watches PreferenceTrainer(callbacks=[EntanglementMonitor()]): the first step and every `every`-th after it.

    rows: pairs to watch, as training data are given. None: `pairs` of the training pairs, evenly spread; by default half as many as a
    step takes, at most 8, so that a look at every 20th step costs less than a tenth of the training. params: see
    `pair_gradients.selected`; None is "lora" where there are adapters, else "head". What a plain step on these pairs would do is
    predicted from the weights' state before the step; what the optimiser's step on its own batch did is measured on them. Logged as
    entanglement/..., kept in full in output_dir/entanglement.jsonl (a resumed training goes on with it), and said in one line when
    the two begin to move together or apart. InputError under FSDP and DeepSpeed, which leave no process a whole gradient.
    """

    def __init__(self, rows: Any = None, *, every: int = 20, pairs: int | None = None, params: str | Select | None = None) -> None:
        for name, value in (("every", every), ("pairs", pairs)):
            if value is not None and value < 1:
                raise InputError(f"{name}: must be at least 1, got {value}")
        self.rows, self.every, self.pairs, self.params = rows, every, pairs, params
        self.trainer: Any = None
        self.probe: Probe | None = None
        self.state: str | None = None
        self._open: tuple[Entanglement, float, float] | None = None
        self._record: dict[str, Any] | None = None

    def attach(self, trainer: Any) -> None:
        """Take the trainer's objective and rows; called by the trainer."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InputError("EntanglementMonitor: needs whole gradients, which FSDP and DeepSpeed split; train with DDP or on one process")
        self.trainer = trainer
        if self.rows is None:
            data = trainer.train_dataset or []
            step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
            count = min(MOST_PAIRS, max(1, step // 2)) if self.pairs is None else self.pairs
            places = sorted({i * len(data) // count for i in range(count)})
            self.rows = [data[i] for i in places if i < len(data)]
        self.rows = trainer.prepare(self.rows, "monitor")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lay out the pairs, and keep of an earlier file the steps that are not taken again."""
        if self.trainer is None:
            raise InputError("EntanglementMonitor: give it to PreferenceTrainer(callbacks=[...]); it needs the trainer's objective")
        self.probe = Probe(self.trainer.model, self.rows, self.trainer.objective, self.params, packed=self.trainer.packed, accelerator=self.trainer.accelerator)
        if state.is_world_process_zero:
            path = Path(args.output_dir) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(path) if line["step"] <= state.global_step]
            with atomic_write(path) as stream:
                stream.writelines(json.dumps(line) + "\n" for line in kept)
            self.state = kept[-1]["state"] if kept else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Gradients before the step."""
        if state.global_step % self.every or self.probe is None:
            return
        start = time.perf_counter()
        with self.trainer.compute_loss_context_manager():
            found = entanglement(self.trainer.model, self.probe, self.trainer.objective)
        self._open = found, float(optimizer.param_groups[0]["lr"]), time.perf_counter() - start

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log-probabilities after the step."""
        if self._open is None or self.probe is None:
            return
        start, (found, rate, spent) = time.perf_counter(), self._open
        with self.trainer.compute_loss_context_manager():
            mean_w, mean_l = _means(self.probe.sums_S(), self.probe)
        ds = mean_w - found.mean_w, mean_l - found.mean_l
        self._record = {**found.record(rate), "learning_rate": rate, "measured_ds_w": ds[0], "measured_ds_l": ds[1], "state": state_of(*ds)}
        self._record["seconds"] = spent + time.perf_counter() - start
        self._open = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the step, keep it, and say what changed."""
        if self._record is None:
            return
        record, self._record = {"step": state.global_step, **self._record}, None
        numbers = {f"entanglement/{k}": float(v) for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step", "pairs", "seconds")}
        wanted = control.should_log
        self.trainer.log({k: v for k, v in numbers.items() if math.isfinite(v)})
        control.should_log = wanted  # a log by a callback would stand in for the step's own
        now = record["state"]
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / FILE, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(_plain(record)) + "\n")
            if now != self.state and (self.state is not None or now != "apart"):
                log.warning(
                    "step %d: %s (%+.3g, %+.3g); cosine of their gradients %.2f, ratio %.2f", state.global_step, MEANING[now],
                    record["measured_ds_w"], record["measured_ds_l"], record["cos"], record["ratio_min"],
                )  # fmt: skip
        self.state = now


def state_of(ds_w: float, ds_l: float) -> str:
    """The name of a move of chosen and rejected log-probability; a key of MEANING."""
    if ds_w == 0 and ds_l == 0:
        return "still"
    if ds_w >= 0 >= ds_l:
        return "apart"
    if ds_w <= 0 <= ds_l:
        return "reversed"
    return "both rising" if ds_w > 0 else "both falling"


def _coupling(products: Sequence[float], d_w: float, d_l: float) -> Coupling:
    dot, square_w, square_l = products
    return Coupling(dot, math.sqrt(max(0.0, square_w)), math.sqrt(max(0.0, square_l)), d_w, d_l)


def _means(logp_S: torch.Tensor, probe: Probe) -> tuple[float, float]:
    """Mean s_w and mean s_l."""
    logp_S = logp_S.detach().double()
    return float(logp_S[probe.chosen_P].mean()), float(logp_S[probe.rejected_P].mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an earlier file; one that was cut off by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
