"""PreferenceTrainer: transformers' Trainer with any objective, on pairs, lists and labels.

The model turns a batch into log-probabilities (`statistics`), the objective turns those of all processes together into a
loss and its gradient per sequence, and the backward pass needs no more than that. So a run on several processes equals
the run on one, for objectives that look at their whole batch too. Loop, optimiser, FSDP, DeepSpeed, logging are Trainer's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from fairlead import registry
from fairlead.errors import FairleadError, InputError
from fairlead.files import atomic_write
from fairlead.kinds import LossOutput, Objective, SequenceStats
from fairlead.logprobs import linear_head, unwrapped
from fairlead.models import logits_width
from fairlead.packed import why_not_packable

from .adapters import trainable_in_4_bits
from .references import Reference, cached_sums
from .statistics import Row, assemble, attention_of, lay_out, packs, token_stats
from .tokens import Report, tokenize

log = logging.getLogger("fairlead")
STATE_FILE = "objective.json"
UNLOGGED_FILE = "unlogged.json"
STAGING = ".unfinished"
MADE_BY = {"ref_logp_mean": "made by fairlead_training.score_dataset", "reward": "or take OnPolicyTrainer, which draws completions"}
# d loss / d logp [S] of this process's sequences and their statistics (logp with gradient) -> the weights to go back with.
Reweight = Callable[[torch.Tensor, SequenceStats], torch.Tensor]


class TrainingError(FairleadError):
    """A training run cannot go on; says what is kept and where."""

    exit_code = 1


@dataclass
class PreferenceConfig(TrainingArguments):
    """TrainingArguments and what preference data need. Plain TrainingArguments are taken too, with these defaults."""

    max_length: int | None = field(default=1024, metadata={"help": "most tokens of a prompt with one completion, and never more than the model has positions"})
    overlong: Literal["drop", "truncate", "truncate_prompt", "raise"] = field(default="drop", metadata={"help": "what to do with longer rows"})
    identical: Literal["drop", "raise"] = field(default="drop", metadata={"help": "what to do with rows whose chosen is their rejected"})
    precompute_ref_log_probs: bool = field(default=True, metadata={"help": "compute the reference's log-probabilities once, and keep them"})
    ref_cache_dir: str | None = field(default=None, metadata={"help": "where they are kept; default: the user's cache directory"})
    disable_dropout: bool = field(default=True, metadata={"help": "train without dropout, as TRL does"})
    pack: bool | None = field(default=None, metadata={"help": "one packed row instead of padding; default: where the model can"})


class _Batch:
    """Keeps accelerate from looking for tensors among the ids."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch as the trainer takes it."""
    return {"batch": _Batch(rows)}


class _TakesUp(TrainerCallback):
    """Begins a training with what its checkpoint had summed since the last log; Trainer would begin with nothing."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore sums and the step they began with."""
        trainer, found = self.trainer, self.trainer._unlogged
        trainer._unlogged = None
        trainer._sums["train"] = {}
        if found is not None and hasattr(trainer, "_tr_loss"):
            trainer._tr_loss += found["loss"]
            trainer._total_loss_scalar -= found["loss"]  # what train() returns is of its own steps alone
            trainer._globalstep_last_logged = found["since"]
            trainer._sums["train"] = {name: [(v, n) for v, n in values] for name, values in found["metrics"].items()}


class PreferenceTrainer(Trainer):
    """Trains a causal LM with a registered objective.

    model: a Hugging Face causal LM. objective: a name, with `objective_settings`, or an Objective. args: TrainingArguments or
    PreferenceConfig; sizes of batches count rows (pairs, groups). train_dataset, eval_dataset: a `datasets.Dataset` or a list of dicts
    with TRL's columns, or tokenised rows (see `tokens`). processing_class: the tokenizer. ref_model: the reference; by default the
    model as it is now: without its adapters, or from log-probabilities computed before training. peft_config: puts adapters on.
    Logs TRL's names: rewards/chosen, rewards/margins, logps/chosen and so on. A callback with a method `attach` is given the trainer
    once it is built; it may set `reweight`, which changes the weights of the sequences in the backward pass of a training step.

    InputError for data or settings that do not fit; TrainingError when a loss is not finite (the batch is kept in output_dir).
    """

    def __init__(
        self, model: Any, objective: str | Objective = "dpo", args: TrainingArguments | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, ref_model: Any = None, peft_config: Any = None,
        objective_settings: Mapping[str, Any] | None = None, callbacks: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        settings = dict(objective_settings or {})
        if isinstance(objective, Objective) and settings:
            raise InputError("objective_settings: go with the name of an objective, not with an Objective")
        self.objective = objective if isinstance(objective, Objective) else registry.create("objective", objective, **settings)
        if args is None:
            args = PreferenceConfig(output_dir="trainer_output")
        defaults = PreferenceConfig.__dataclass_fields__
        self._own: dict[str, Any] = {name: getattr(args, name, defaults[name].default) for name in PreferenceConfig.__annotations__}
        self._staging: str | None = None
        self._unlogged: dict[str, Any] | None = None
        self.temperature = 1.0
        self.reweight: Reweight | None = None
        args.remove_unused_columns = False
        if args.n_gpu > 1:
            log.warning("one GPU is used; `accelerate launch` uses all of them")
            args._n_gpu = 1
        trainable_in_4_bits(model)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if self._own["disable_dropout"]:
            _without_dropout(model)
        self.packed = packs(model) if self._own["pack"] is None else bool(self._own["pack"])
        if self.packed and not packs(model):
            raise InputError(f"pack: this model cannot be packed ({why_not_packable(model)}); leave pack out")
        linear_head(model)  # found out now: a wrapped or sharded model cannot be tried
        self.model = model  # Trainer sets it too, after the data are read
        self.reference = self._make_reference(model, ref_model) if self._needs_reference() else None
        self.reports: dict[str, Report] = {}
        self._sums: dict[str, dict[str, list[tuple[float, int]]]] = {"train": {}, "eval": {}}
        train, held_out = (self._tokenised(d, processing_class, name) for d, name in ((train_dataset, "train"), (eval_dataset, "eval")))
        super().__init__(
            model=model, args=args, data_collator=collate, train_dataset=train, eval_dataset=held_out, processing_class=processing_class,
            callbacks=callbacks, **options,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.label_names: list[str] = []
        self.add_callback(_TakesUp(self))
        if ref_model is not None and unwrapped(ref_model).device != args.device:
            ref_model.to(args.device)
        for rows in (train, held_out):
            self._add_reference(rows)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(self)

    def _needs_reference(self) -> bool:
        return any(name in self.objective.needs for name in ("ref_logp", "mismatched_ratio"))

    def _make_reference(self, model: Any, ref_model: Any) -> Reference:
        return Reference(model, ref_model)

    def prepare(self, dataset: Any, name: str) -> list[dict[str, Any]]:
        """Rows as the trainer trains on them, tokenised and with the reference's log-probabilities; for callbacks with rows of their own."""
        rows: list[dict[str, Any]] = self._tokenised(dataset, self.processing_class, name)
        self._add_reference(rows)
        if self.reference is not None and "ref_logp" in self.objective.needs:
            for row in rows:
                if row.get("ref_logp") is None:
                    row["ref_logp"] = self.reference.sums([row], self.objective)
        return rows

    def _tokenised(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        """Tokenised rows of a data set, or None; what was left out is counted in `reports` and logged."""
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            raise InputError(f"{name}_dataset: give one data set, got a mapping of {len(dataset)}")
        if tokenizer is None and not all("completion_ids" in row for row in dataset):
            raise InputError("processing_class: text needs its tokenizer")
        rows, report = tokenize(
            dataset, tokenizer, max_length=self._longest(), overlong=self._own["overlong"], identical=self._own["identical"]
        )
        if not rows:
            raise InputError(f"{name}_dataset: no row is left ({report.line()})")
        width = logits_width(unwrapped(self.model))
        for i, row in enumerate(rows):
            ids = [*row["prompt_ids"], *(token for answer in row["completion_ids"] for token in answer)]
            if max(ids) >= width or min(ids) < 0:
                wrong = max(ids) if max(ids) >= width else min(ids)
                raise InputError(f"{name}_dataset: row {i} has the id {wrong}, the model knows ids below {width}; use the model's own tokenizer")
        if report.dropped or report.truncated:
            log.warning("%s data: %s", name, report.line())
        self.reports[name] = report
        self._check_columns(rows, name)
        return rows

    def _longest(self) -> int | None:
        """Most tokens of a row: max_length, and never more than the model has positions."""
        positions = getattr(unwrapped(self.model).config.get_text_config(), "max_position_embeddings", None)
        bounds = [n for n in (self._own["max_length"], positions) if isinstance(n, int) and n > 0]
        return min(bounds, default=None)

    def _check_columns(self, rows: list[dict[str, Any]], name: str) -> None:
        """InputError where the objective needs what the rows lack."""
        made = {"group", "ref_logp", "mismatched_ratio", "weighted_length", "wpo_weight", "token_logp", "token_mask"}
        for column in self.objective.needs:
            missing = next((i for i, row in enumerate(rows) if row.get(column) is None), None)
            if column not in made and missing is not None:
                made_by = f" ({MADE_BY[column]})" if column in MADE_BY else ""
                raise InputError(f"{name}_dataset: row {missing} has no {column}, which {type(self.objective).__name__} needs{made_by}")
        if "group" in self.objective.needs:
            alone = next((i for i, row in enumerate(rows) if len(row["completion_ids"]) < 2), None)
            if alone is not None:
                raise InputError(f"{name}_dataset: row {alone} has one completion; {type(self.objective).__name__} compares two or more")
        elif "role" in self.objective.needs and "ref_logp" in self.objective.needs:
            roles = {role for row in rows for role in row["role"]}
            if len(roles) == 1 and name == "train":
                kind = "wanted" if 1 in roles else "unwanted"
                raise InputError(f"train_dataset: all completions are {kind}; {type(self.objective).__name__} needs both labels")

    def _add_reference(self, rows: list[dict[str, Any]] | None) -> None:
        """Mismatched completions where the objective asks for them, and the reference's log-probabilities of all."""
        if self.reference is None or rows is None:
            return
        columns = [("ref_logp", "completion_ids")] if "ref_logp" in self.objective.needs else []
        if "mismatched_ratio" in self.objective.needs:
            for i, row in enumerate(rows):
                row["mismatched_ids"] = rows[i - 1]["completion_ids"][:1] * len(row["completion_ids"])
            columns.append(("mismatched_ref_logp", "mismatched_ids"))
        if not self._own["precompute_ref_log_probs"] and self.reference.lives:
            return
        for column, completions in columns:
            if all(row.get(column) is not None for row in rows):
                continue
            values = iter(cached_sums(self.reference, rows, self._own["ref_cache_dir"], self.objective, completions, self.accelerator))
            for row in rows:
                row[column] = [next(values) for _ in row[completions]]

    # -- one step ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward under one attention: checkpointed layers run again in the backward pass."""
        with attention_of(self.model, self.packed):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The objective's loss; its gradient in the log-probabilities of this process's sequences."""
        rows = inputs["batch"].rows
        stats = self.statistics(model, rows)
        self.objective.training = model.training
        out, own = self._over_processes(stats, rows)
        dlogp = out.dlogp[own].to(stats.logp.device)
        if self.reweight is not None and model.training:
            dlogp = self.reweight(dlogp, stats)
        carried = (dlogp * stats.logp).sum()
        if out.dtokens is not None:
            tokens_ST = stats.extra["token_logp"]
            carried = carried + (out.dtokens[own, : tokens_ST.shape[1]].to(tokens_ST.device) * tokens_ST).sum()
        carried = carried * self.accelerator.num_processes  # gradients are averaged over processes
        loss = carried + (out.loss.to(carried.device) - carried).detach()
        kept = self._sums["train" if model.training else "eval"]
        for name, value in out.metrics.items():
            kept.setdefault(name, []).append((float(value), len(rows)))
        return (loss, out) if return_outputs else loss

    def statistics(self, model: Any, rows: Sequence[Row]) -> SequenceStats:
        """SequenceStats of this process's rows, with gradient where it is on. Checkpointed layers run again in the backward pass,
        which then needs `attention_of` too, as `training_step` has it."""
        device = unwrapped(model).device
        with attention_of(self.model, self.packed):
            columns = self.columns(model, rows, device)
            found = token_stats(model, lay_out(rows, self.packed, device), self.temperature, squares="wpo_weight" in self.objective.needs)
        return assemble(found, rows, self.objective, tokens="token_logp" in self.objective.needs, columns=columns)

    def columns(self, model: Any, rows: Sequence[Row], device: Any) -> dict[str, torch.Tensor]:
        """Columns of the statistics that the rows alone do not give: those of the reference."""
        columns: dict[str, torch.Tensor] = {}
        if self.reference is not None and "mismatched_ratio" in self.objective.needs:
            with torch.no_grad():
                found = token_stats(model, lay_out(rows, self.packed, device, "mismatched_ids"))
            columns["mismatched_ratio"] = found.sum_S() - self._reference(rows, "mismatched_ref_logp", "mismatched_ids", device)
        if self.reference is not None and "ref_logp" in self.objective.needs:
            columns["ref_logp"] = self._reference(rows, "ref_logp", "completion_ids", device)
        return columns

    def _reference(self, rows: Sequence[Row], column: str, completions: str, device: Any) -> torch.Tensor:
        if all(row.get(column) is not None for row in rows):
            values = [value for row in rows for value in row[column]]
        else:
            assert self.reference is not None
            values = self.reference.sums(rows, self.objective, completions)
        return torch.tensor(values, dtype=torch.float32, device=device)

    def _over_processes(self, stats: SequenceStats, rows: Sequence[Row]) -> tuple[LossOutput, slice]:
        """The objective of the sequences of all processes, and which of them are ours."""
        whole, start = _gathered(stats, self.accelerator)
        try:
            out = self.objective(whole)
            if not bool(out.loss.isfinite()):
                raise InputError(f"the loss is {float(out.loss)}")
        except InputError as error:
            path = Path(self.args.output_dir) / f"failed-batch-step-{self.state.global_step}.json"
            with atomic_write(path) as stream:
                json.dump({"error": str(error), "rows": [dict(row) for row in rows]}, stream)
            raise TrainingError(f"step {self.state.global_step}: {error}; the batch is in {path}") from None
        return out, slice(start, start + len(stats.logp))

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss of one batch of evaluation; metrics are logged as eval_NAME."""
        with torch.no_grad(), attention_of(self.model, self.packed), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Trainer's, with the objective's metrics among those it returns, so that the best model can be chosen by them."""
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._means("eval").items()})
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> dict[str, float]:
        """Trainer's, on the data set of the trainer or on another with the same columns."""
        rows = None if eval_dataset is None else self.prepare(eval_dataset, "eval")
        found: dict[str, float] = super().evaluate(rows, *args, **options)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the objective's metrics since the last log."""
        super().log({**logs, **self._means("train")} if "loss" in logs else logs, start_time)

    def _means(self, mode: str) -> dict[str, float]:
        """Means over rows of the metrics since they were last taken."""
        means = {name: sum(v * n for v, n in values) / sum(n for _, n in values) for name, values in self._sums[mode].items()}
        self._sums[mode].clear()
        return means

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: batches hold rows, not tensors."""
        return 0

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint aside and rename it when it is whole, so that a kill or a full disk keeps the last good one."""
        final = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        staging = final.parent / STAGING
        aside = staging / final.name
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = str(staging)
            super()._save_checkpoint(model, trial)
            self._save_state(aside)
            best, best_step = self.state.best_model_checkpoint, self.state.best_global_step
            if best is None or best.startswith(str(staging)):
                self.state.best_model_checkpoint = str(final.parent / f"checkpoint-{best_step}") if best_step else None
                if self.args.should_save:
                    self.state.save_to_json(str(aside / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside, final)
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and "writ" not in str(error):
                raise
            shutil.rmtree(staging, ignore_errors=True)
            cause = str(error).splitlines()[0]
            raise TrainingError(f"{final}: the checkpoint cannot be written ({cause}); earlier checkpoints are as they were") from None
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            from transformers.trainer_utils import rotate_checkpoints

            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(final.parent), save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True,
            )  # fmt: skip

    def _save_state(self, folder: Path) -> None:
        """What a resumed run needs beyond Trainer's own files; called on every process."""
        if self.args.should_save:
            with atomic_write(folder / STATE_FILE) as stream:
                json.dump(_plain(self.objective.state_dict()), stream)
            if hasattr(self, "_tr_loss"):  # not in the first releases of transformers 5
                with atomic_write(folder / UNLOGGED_FILE) as stream:
                    json.dump({"loss": float(self._tr_loss), "since": self._globalstep_last_logged, "metrics": self._sums["train"]}, stream)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path, unlogged = (Path(resume_from_checkpoint) / name for name in (STATE_FILE, UNLOGGED_FILE))
        if unlogged.exists():
            self._unlogged = json.loads(unlogged.read_text(encoding="utf-8"))
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
            self.objective.load_state_dict({k: torch.tensor(v["tensor"]) if isinstance(v, dict) else v for k, v in state.items()})


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of numbers and tensors as JSON."""
    return {k: {"tensor": v.tolist()} if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _without_dropout(model: Any) -> None:
    """Dropout layers, and the rates that a module hands to torch's functions itself (`dropout`, `attention_dropout`, ...)."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _gathered(stats: SequenceStats, accelerator: Any) -> tuple[SequenceStats, int]:
    """The statistics of all processes, detached, and where ours begin; group numbers are made to differ."""
    columns = {name: value for name in ("logp", "length", "ref_logp", "group", "role", "rank", "reward", "weight") if (value := getattr(stats, name)) is not None}
    own = {name: value.detach() for name, value in {**columns, **{f"extra {k}": v for k, v in stats.extra.items()}}.items()}
    if accelerator.num_processes == 1:
        parts, place = [own], 0
    else:
        from accelerate.utils import gather_object

        parts, place = gather_object([{name: value.cpu() for name, value in own.items()}]), accelerator.process_index
        first = 0
        for part in parts:
            part["group"] = part["group"] + first
            first = int(part["group"].max()) + 1
    joined = {name: _joined([part[name] for part in parts]) for name in own}
    extra = {name.removeprefix("extra "): value for name, value in joined.items() if name.startswith("extra ")}
    known = {name: value for name, value in joined.items() if not name.startswith("extra ")}
    return SequenceStats(**known, extra=extra), sum(len(part["logp"]) for part in parts[:place])


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    if values[0].dim() < 2 or len(values) == 1:
        return torch.cat(values)
    width = max(v.shape[1] for v in values)
    return torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[1])) for v in values])
