"""`fairlead train`: any objective on a model and a file or data set of one's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from fairlead.errors import InputError

ADAPTERS = ("none", "lora")


@click.command()
@click.option("--objective", default="dpo", show_default=True, help="Registered objective; `fairlead methods --kind objective` lists them.")
@click.option("--objective-set", "objective_settings", multiple=True, metavar="NAME=VALUE", help="A setting of the objective; may be repeated.")
@click.option("--reward", default=None, help="Registered reward: trains on answers that the model writes (reinforce, rloo, grpo, gspo).")
@click.option("--reward-set", "reward_settings", multiple=True, metavar="NAME=VALUE", help="A setting of the reward; may be repeated.")
@click.option("--model", required=True, help="Folder, hub id or zoo:NAME of a causal LM.")
@click.option("--dataset", required=True, help="JSONL or Parquet file, or a hub id, with TRL's columns; prompts with --reward.")
@click.option("--split", default="train", show_default=True, help="Split of a hub data set.")
@click.option("--eval-dataset", default=None, help="File with rows to evaluate on.")
@click.option("--peft", "adapter", type=click.Choice(ADAPTERS), default="none", show_default=True, help="Train an adapter and leave the model alone.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), default=None, help="YAML file of TrainingArguments and PreferenceConfig.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="One of these settings; may be repeated, and counts before the file.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory: report, checkpoints, and the model under model/.")
@click.option("--resume", is_flag=True, help="Go on with a training that was stopped.")
@click.option("--force", is_flag=True, help="Replace a finished training.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def train(
    objective: str, objective_settings: tuple[str, ...], reward: str | None, reward_settings: tuple[str, ...], model: str, dataset: str,
    split: str, eval_dataset: str | None, adapter: str, config_file: Path | None, settings: tuple[str, ...], seed: int, out: Path,
    resume: bool, force: bool, as_json: bool,
) -> int:  # fmt: skip
    """Train a model on preferences, or on a reward.

    Example: fairlead train --objective simpo --model zoo:sft --dataset pairs.jsonl --peft lora --set max_steps=100 --out runs/simpo

    On several devices or processes: accelerate launch -m fairlead train ...
    """
    from fairlead import registry
    from fairlead.cli import echo_json, parse_settings
    from fairlead.runs import Run

    from ..data import read

    method = registry.get("objective", objective)
    built = method.load()(**parse_settings(objective_settings))
    if reward_settings and reward is None:
        raise InputError("--reward-set belongs to a reward; name it with --reward")
    judge = None if reward is None else registry.create("reward", reward, **parse_settings(reward_settings))
    rows, held_out = read(dataset, split), None if eval_dataset is None else read(eval_dataset, split)
    arguments = {**_file(config_file), **parse_settings(settings)}
    shown = {
        "objective": objective, "settings": built.config.public_dict(), "model": model, "dataset": dataset, "split": split,
        "eval_dataset": eval_dataset, "peft": adapter, "arguments": arguments,
        **({} if judge is None else {"reward": reward, "reward_settings": judge.config.public_dict()}),
    }  # fmt: skip
    args = _arguments(arguments, out, seed, judge is not None)
    from fairlead.models import load

    policy, tokenizer = load(model, device="cpu" if args.use_cpu else None)
    if os.environ.get("RANK", "0") != "0":  # the first process keeps the run directory
        return _follow(policy, built, judge, args, rows, held_out, tokenizer, adapter, resume)
    run = Run.open(out, "train", shown, seed, resume=resume, force=force)
    run.describe(f"Training with {objective}", method.summary, method.paper)
    checkpoints = sorted((out / "checkpoints").glob("checkpoint-*")) if resume else []
    if not resume:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        shutil.rmtree(out / "model", ignore_errors=True)
    try:
        trainer = _trainer(policy, built, judge, args, rows, held_out, tokenizer, adapter, run)
        _train(trainer, bool(checkpoints), out)
    except KeyboardInterrupt:
        run.fail("interrupted", "Ctrl-C")
        click.echo(f"interrupted; the last checkpoint is kept: the same command with --resume goes on ({out})", err=True)
        return 130
    except BaseException as error:
        run.fail("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    run.finish()
    if as_json:
        echo_json({"dir": str(out), "report": str(out / "report.html"), "model": str(out / "model"), "rows": trainer.reports["train"].rows})
    else:
        click.echo(f"data: {trainer.reports['train'].line()}\nmodel: {out / 'model'}\nreport: {out / 'report.html'}")
    return 0


def _follow(policy: Any, built: Any, judge: Any, args: Any, rows: Any, held_out: Any, tokenizer: Any, adapter: str, resume: bool) -> int:
    """The training on a process that is not the first: it writes nothing but its part of the checkpoints."""
    out = Path(args.output_dir).parent
    trainer = _trainer(policy, built, judge, args, rows, held_out, tokenizer, adapter, None)
    _train(trainer, resume and any(Path(args.output_dir).glob("checkpoint-*")), out)
    return 0


def _train(trainer: Any, resume: bool, out: Path) -> None:
    trainer.train(resume_from_checkpoint=True if resume else None)
    trainer.save_model(str(out / "model"))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _file(path: Path | None) -> dict[str, Any]:
    import yaml

    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of settings, as in learning_rate: 1e-6")
    return content


def _arguments(settings: dict[str, Any], out: Path, seed: int, on_policy: bool) -> Any:
    """PreferenceConfig or OnPolicyConfig of the settings; an unknown or impossible one is a line."""
    import difflib

    import torch

    from ..on_policy import OnPolicyConfig
    from ..trainer import PreferenceConfig

    kind = OnPolicyConfig if on_policy else PreferenceConfig
    known = kind.__dataclass_fields__
    for name in settings:
        if name not in known or name in ("output_dir", "seed"):
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; see TrainingArguments and {kind.__name__}"))
    defaults = {"report_to": [], "logging_steps": 10, "learning_rate": 1e-6, "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True}
    settings = {name: _typed(name, value, known[name].default) for name, value in settings.items()}
    try:
        return kind(output_dir=str(out / "checkpoints"), seed=seed, **{**defaults, **settings})
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"settings: {str(error).splitlines()[0]}") from None


def _typed(name: str, value: Any, default: Any) -> Any:
    """A setting of the type of its default; YAML reads 1e-6 as text, and some whole numbers may be given as ratios."""
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if number and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    right = isinstance(value, (int, float)) and not isinstance(value, bool) if number else isinstance(value, bool)
    if not isinstance(default, (bool, int, float)) or value is None or right:
        return value
    raise InputError(f"{name}: must be {'a number' if number else 'true or false'}, got {value!r}")


def _trainer(
    policy: Any, objective: Any, judge: Any, args: Any, rows: Any, held_out: Any, tokenizer: Any, adapter: str, run: Any
) -> Any:
    from transformers import PrinterCallback

    from ..run_report import RunReport

    options: dict[str, Any] = {"eval_dataset": held_out, "processing_class": tokenizer, "callbacks": [] if run is None else [RunReport(run)]}
    if adapter == "lora":
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer: Any
    if judge is None:
        from ..trainer import PreferenceTrainer

        trainer = PreferenceTrainer(policy, objective, args, rows, **options)
    else:
        from ..on_policy import OnPolicyTrainer

        trainer = OnPolicyTrainer(policy, objective, args, rows, judge, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer
