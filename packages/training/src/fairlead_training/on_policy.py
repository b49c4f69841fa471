"""OnPolicyTrainer: the policy writes completions, a reward judges them, and an on-policy objective moves the policy.

At a step every prompt of the batch gets `num_generations` completions from the core's rollout engine; from there on they
are tokenised rows with a `reward`, and everything else is PreferenceTrainer's. What is drawn depends on the seed, the step
and the prompt's place in the batch of all processes alone, so a run on several processes, or a resumed one, draws the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fairlead.errors import InputError
from fairlead.files import atomic_write
from fairlead.generation import Generation, check_lengths, encode, generate
from fairlead.kinds.reward import as_reward, question
from fairlead.logprobs import unwrapped

from .references import Reference
from .statistics import Row, attention_of, lay_out, token_stats
from .tokens import Report
from .trainer import PreferenceConfig, PreferenceTrainer, collate

ROLLOUTS_FILE = "rollouts.json"
RESERVED = ("finished", "prompts", "completions", "responses")
GIVEN = ("reward", "group", "token_logp", "ref_token_logp")
UNUSED = ("max_length", "overlong", "identical", "precompute_ref_log_probs", "ref_cache_dir")  # they are about completions that are given


@dataclass
class OnPolicyConfig(PreferenceConfig):
    """PreferenceConfig and how completions are drawn. Sizes of batches count prompts, each with all its completions."""

    num_generations: int = field(default=8, metadata={"help": "completions of each prompt"})
    max_completion_length: int = field(default=256, metadata={"help": "most tokens of a completion"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the draw, and of the log-probabilities that are trained"})
    top_p: float | None = field(default=None, metadata={"help": "draw from the likeliest tokens of this much probability"})
    top_k: int | None = field(default=None, metadata={"help": "draw from this many likeliest tokens"})
    beta: float = field(default=0.0, metadata={"help": "KL to the reference, taken off a sequence's reward; GRPO's own is its beta_kl"})
    num_iterations: int = field(default=1, metadata={"help": "steps on the same completions, with clipped ratios to the policy that drew them"})


class OnPolicyTrainer(PreferenceTrainer):
    """Trains a causal LM on a reward with `reinforce`, `rloo`, `grpo` or `gspo`.

    reward: a Reward, a registered name, {"name": ..., settings} or a function (prompts, completions, **columns) -> numbers. It gets the
    last message of a prompt and the completion, both as text (as ids without a tokenizer), and the other columns of the data set. train_dataset: rows with `prompt` (text or chat messages) or `prompt_ids`.
    ref_model: for `beta` and for GRPO's `beta_kl`; by default the model without its adapters, or a copy of it as it is now.
    The rest is PreferenceTrainer's. Logs also reward_std, kl and reward_before_kl where `beta` is above 0, completions/mean_length and completions/clipped_ratio (the share cut at
    max_completion_length).

    InputError for an objective that does not learn from rewards, prompts that leave no room, and weights that are sharded.
    """

    def __init__(
        self, model: Any, objective: Any = "grpo", args: Any = None, train_dataset: Any = None, reward: Any = None, **options: Any
    ) -> None:
        if reward is None:
            raise InputError("reward: on-policy training needs one: a registered name, a Reward or a function (prompts, completions)")
        if isinstance(reward, (list, tuple)):
            raise InputError('reward: give one; {"name": "weighted", "rewards": [...], "weights": [...]} sums several')
        self.reward = as_reward(reward)
        args = OnPolicyConfig(output_dir="trainer_output") if args is None else args
        defaults = OnPolicyConfig.__dataclass_fields__
        self.draw: dict[str, Any] = {name: getattr(args, name, defaults[name].default) for name in OnPolicyConfig.__annotations__}
        for name in UNUSED:
            if getattr(args, name, defaults[name].default) != defaults[name].default:
                raise InputError(f"{name}: is about completions in the data, and here the model writes them; leave it out (max_completion_length bounds them)")
        for name, least in (("num_generations", 1), ("max_completion_length", 1), ("num_iterations", 1), ("beta", 0)):
            if self.draw[name] < least:
                raise InputError(f"{name}: must be at least {least}, got {self.draw[name]}")
        if self.draw["temperature"] <= 0:
            raise InputError(f"temperature: must be above 0, got {self.draw['temperature']}: completions must differ to be compared")
        self._kept: dict[int, list[dict[str, Any]]] = {}
        self._place, self._evaluated = (-1, 0), 0
        super().__init__(model, objective, args, train_dataset, **options)
        self.temperature = self.draw["temperature"]
        if self.reference is not None and self.reference.model is not None:
            self.reference.model.to(self.args.device)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("on-policy training draws from whole weights; use one process per whole model (DDP), not FSDP or DeepSpeed")

    # -- data -------------------------------------------------------------------------------------------------------------

    def _needs_reference(self) -> bool:
        return bool(self.draw["beta"]) or "ref_token_logp" in self.objective.needs

    def _make_reference(self, model: Any, ref_model: Any) -> Reference:
        reference = Reference(model, ref_model)
        return reference if reference.lives else Reference(model, copy.deepcopy(unwrapped(model)))

    def _tokenised(self, dataset: Any, tokenizer: Any, name: str) -> Any:
        """Prompts as ids, with the row's other columns for the reward."""
        if dataset is None:
            return None
        foreign = [n for n in self.objective.needs if n not in GIVEN]
        if foreign or "reward" not in self.objective.needs:
            cause = f"needs {foreign[0]}" if foreign else "has no use for a reward"
            raise InputError(f"objective: {type(self.objective).__name__} {cause}; on-policy objectives are reinforce, rloo, grpo and gspo")
        self._past: str = getattr(self.objective, "past", "") if self.draw["num_iterations"] > 1 else ""
        if self.draw["num_iterations"] > 1 and not self._past:
            raise InputError(f"num_iterations: {type(self.objective).__name__} knows no ratio to the policy that drew; give 1, or take grpo or gspo")
        if self._past == "old_token_logp" and "token_logp" not in self.objective.needs:
            self.objective.needs = (*self.objective.needs, "token_logp")
        if "group" in self.objective.needs and self.draw["num_generations"] < 2:
            raise InputError(f"num_generations: {type(self.objective).__name__} compares completions of a prompt, give 2 or more")
        rows: list[dict[str, Any]] = []
        for i, row in enumerate(dataset):
            if "prompt" not in row and "prompt_ids" not in row:
                raise InputError(f"{name}_dataset: row {i} has no prompt; its columns are {', '.join(row) or 'none'}")
            given = torch.tensor(row["prompt_ids"]) if "prompt_ids" in row else row["prompt"]
            columns = {k: v for k, v in row.items() if k not in ("prompt_ids", "prompt")}
            taken = next((k for k in columns if k in RESERVED), None)
            if taken is not None:
                raise InputError(f"{name}_dataset: row {i}: a column {taken} would be taken for the reward's own argument; rename it")
            ids = encode(tokenizer, given, i)
            check_lengths(unwrapped(self.model), [ids], self.draw["max_completion_length"], i)
            rows.append({"prompt_ids": ids.tolist(), "prompt": row.get("prompt"), "columns": columns})
        if not rows:
            raise InputError(f"{name}_dataset: holds no prompt")
        names = dict.fromkeys(column for row in rows for column in row["columns"])
        for row in rows:
            row["columns"] = {column: row["columns"].get(column) for column in names}
        self.reports[name] = Report(rows=len(rows))
        return rows

    def _add_reference(self, rows: list[dict[str, Any]] | None) -> None:
        """Nothing: completions do not exist yet."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        repeats = self.draw["num_iterations"]
        if repeats == 1:
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        count = len(train_dataset if train_dataset is not None else self.train_dataset)
        return _Repeated(count, together, repeats, self.args.seed, lambda: int(self.state.global_step))

    # -- one step ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Draw completions, or take up those of an earlier step, then forward and backward."""
        step = self.state.global_step
        micro = self._place[1] + 1 if self._place[0] == step else 0
        self._place = (step, micro)
        if step % self.draw["num_iterations"] == 0:
            first = (step * self.args.gradient_accumulation_steps + micro) * self.args.train_batch_size * self.accelerator.num_processes
            self._kept[micro] = self.completions(inputs["batch"].rows, self.args.seed, first, "train")
        loss: torch.Tensor = super().training_step(model, collate(self._kept[micro]), num_items_in_batch)
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Draw completions of held-out prompts, the same ones at every evaluation; the reward is logged as eval_reward."""
        first = self._evaluated
        self._evaluated += self.args.eval_batch_size * self.accelerator.num_processes
        drawn = self.completions(inputs["batch"].rows, self.args.seed + 1, first, "eval")
        return super().prediction_step(model, collate(drawn), prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Trainer's, with the draw begun anew."""
        self._evaluated = 0
        return super().evaluation_loop(*args, **options)

    @torch.no_grad()
    def completions(self, rows: Sequence[Row], seed: int, first: int, mode: str) -> list[dict[str, Any]]:
        """Tokenised rows: `num_generations` completions of each prompt with their rewards, KL taken off.

        seed, first: the noise of row i of this process is that of (seed, first + its place in the batch of all processes).
        """
        model = unwrapped(self.model)
        first += self.accelerator.process_index * (self.args.train_batch_size if mode == "train" else self.args.eval_batch_size)
        training = model.training
        model.eval()
        try:
            made = self._generated(rows, seed, first)
            drawn = [{"prompt_ids": row["prompt_ids"], "completion_ids": [a.ids.tolist() for a in answers]} for row, answers in zip(rows, made, strict=True)]
            rewards, shown = self._judged(rows, [a for answers in made for a in answers])
            _spread(drawn, "reward", rewards.tolist())
            self._add_past(drawn, shown)
        finally:
            model.train(training)
        names = sorted(shown)
        means = self.accelerator.reduce(torch.tensor([float(shown[name]) for name in names], device=self.args.device), "mean")
        for name, value in zip(names, means.tolist(), strict=True):
            self._sums[mode].setdefault(name, []).append((value, len(rows)))
        return drawn

    def _generated(self, rows: Sequence[Row], seed: int, first: int) -> list[list[Generation]]:
        with self.accelerator.autocast():
            return generate(
                unwrapped(self.model), self.processing_class, [torch.tensor(row["prompt_ids"]) for row in rows], seed=seed, first_index=first,
                n=self.draw["num_generations"], max_new_tokens=self.draw["max_completion_length"], temperature=self.temperature,
                top_p=self.draw["top_p"], top_k=self.draw["top_k"],
            )  # fmt: skip

    def _judged(self, rows: Sequence[Row], answers: Sequence[Generation]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Rewards of the completions, in order, and what is logged of them."""
        n, ids = self.draw["num_generations"], self.processing_class is None
        prompts = [torch.tensor(row["prompt_ids"]) if ids else self._question(row) for row in rows for _ in range(n)]
        columns = {name: [row["columns"].get(name) for row in rows for _ in range(n)] for name in rows[0]["columns"]}
        finished = [answer.finished for answer in answers]
        rewards = self.reward(prompts, [a.ids if ids else a.text for a in answers], finished=finished, **columns)
        return rewards, {
            "reward_std": rewards.reshape(-1, n).std(1, correction=0).mean(),
            "completions/mean_length": sum(len(a.ids) for a in answers) / len(answers),
            "completions/clipped_ratio": 1 - sum(finished) / len(answers),
        }

    def _question(self, row: Row) -> Any:
        return self.processing_class.decode(row["prompt_ids"], skip_special_tokens=True) if row["prompt"] is None else question(row["prompt"])

    def _add_past(self, drawn: list[dict[str, Any]], shown: dict[str, Any]) -> None:
        """Log-probabilities under the policy that drew, where later steps or the KL need them, and under the reference."""
        beta, past = self.draw["beta"], self._past
        if past or beta:
            own, sums = self._by_token(self.model, drawn)
        if past:
            _spread(drawn, past, own if past.endswith("token_logp") else sums)
        if self.reference is None:
            return
        with self.reference.active() as model:
            tokens, reference_sums = self._by_token(model, drawn)
        if "ref_token_logp" in self.objective.needs:
            _spread(drawn, "ref_token_logp", tokens)
        if beta:
            kl = [a - b for a, b in zip(sums, reference_sums, strict=True)]
            shown["kl"] = sum(kl) / len(kl)
            shown["reward_before_kl"] = sum(sum(row["reward"]) for row in drawn) / len(kl)
            values = iter(kl)
            for row in drawn:
                row["reward"] = [r - beta * next(values) for r in row["reward"]]

    def _by_token(self, model: Any, rows: Sequence[Row]) -> tuple[list[list[float]], list[float]]:
        """Log-probabilities of the tokens of every completion, and their sums."""
        with attention_of(model, self.packed), self.accelerator.autocast():
            found = token_stats(model, lay_out(rows, self.packed, unwrapped(model).device), self.temperature)
        table, sums = found.table_ST().tolist(), found.sum_S().tolist()
        return [values[:count] for values, count in zip(table, found.length_S().tolist(), strict=True)], sums

    def columns(self, model: Any, rows: Sequence[Row], device: Any) -> dict[str, torch.Tensor]:
        """Tables of older log-probabilities of the rows, [S, T]."""
        found = {}
        for name in ("old_token_logp", "ref_token_logp"):
            if name in rows[0] and "token_logp" in self.objective.needs:
                values = [torch.tensor(v) for row in rows for v in row[name]]
                found[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True).to(device)
        return found

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        if not self._past:
            return
        kept: list[dict[int, Any]] = [self._kept]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            kept = gather_object(kept)
        if self.args.should_save:
            with atomic_write(folder / ROLLOUTS_FILE) as stream:
                json.dump({"drawn_for": self._drawn_for(), "rollouts": kept}, stream)

    def _drawn_for(self) -> dict[str, int]:
        """What must be the same when kept completions are taken up again."""
        return {
            "num_iterations": self.draw["num_iterations"], "num_generations": self.draw["num_generations"], "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.train_batch_size, "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }  # fmt: skip

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / ROLLOUTS_FILE
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"drawn_for": {"num_iterations": 1}, "rollouts": None}
        if self._past or found["rollouts"]:
            for name, now in self._drawn_for().items():
                then = found["drawn_for"].get(name, now)
                if then != now:
                    raise InputError(f"{resume_from_checkpoint}: was made with {name}={then}, now it is {now}; resume with the same")
            kept: Mapping[str, Any] = found["rollouts"][self.accelerator.process_index]
            self._kept = {int(micro): rows for micro, rows in kept.items()}


class _Repeated(torch.utils.data.Sampler[int]):
    """Indices in a seeded order, each chunk of one optimiser step `repeats` times; what does not fill a chunk is left out.

    step: the optimiser steps that are done, which tell the epoch. `set_epoch` does not reach a sampler whose first batches are skipped.
    """

    def __init__(self, count: int, together: int, repeats: int, seed: int, step: Callable[[], int]) -> None:
        if count < together:
            raise InputError(f"train_dataset: {count} prompts, one step takes {together}; give more, or a smaller batch")
        self.count, self.together, self.repeats, self.seed, self.step = count, together, repeats, seed, step

    def __len__(self) -> int:
        return self.count // self.together * self.together * self.repeats

    def __iter__(self) -> Iterator[int]:
        epoch = self.step() // (len(self) // self.together)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for start in range(0, self.count // self.together * self.together, self.together):
            for _ in range(self.repeats):
                yield from order[start : start + self.together]


def _spread(rows: Sequence[dict[str, Any]], name: str, values: Sequence[Any]) -> None:
    """One value per completion, in order, as a column of the rows."""
    place = 0
    for row in rows:
        row[name] = list(values[place : place + len(row["completion_ids"])])
        place += len(row["completion_ids"])
