"""Trains and measures what the wheel carries: `python -m fairlead_zoo.release --seed 3 --ship`.

A maintainer's tool, resumable as every build. It trains the family of a seed (and the English model) into the cache,
measures the gate and the battery on the stored bfloat16 weights, and writes `checkpoints/figures.json`: the seed table,
recipe and content hashes, sizes and figures. Without `--ship` only the seed's line of the table is added.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import click
import torch

from . import catalogue, evaluate
from . import lexicon as lx
from .build import STANDARD, build_stage, recipe_hash
from .english import build_english
from .files import cache_dir, write_text
from .real_models import quiet
from .stages import NARROW, STAGES
from .world import World

FAMILY = ("base", "sft", "weak", "dpo", "reward")


def train_family(seed: int, root: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Train every named stage into `root/NAME` unless it is there; returns recipe hash and training figures of each."""
    from fairlead.progress import bar

    world = World(seed)
    made: dict[str, dict[str, Any]] = {}
    with bar() as report:
        for name in names:
            stage, place = STAGES[name], root / name
            parent = made[stage.parent]["recipe"] if stage.parent else ""
            note = root / f"{name}.json"
            recipe = recipe_hash(world, stage, seed, STANDARD, parent)
            kept = json.loads(note.read_text()) if note.exists() else {}
            if kept.get("recipe") != recipe:
                state = root / f"{name}-{recipe}.safetensors"
                above = root / stage.parent if stage.parent else None
                training = build_stage(world, stage, seed, above, place, state_file=state, report=report)
                kept = {"recipe": recipe, "training": training}
                write_text(note, json.dumps(kept))
            made[name] = kept
    return made


def measure(seed: int, root: Path) -> dict[str, Any]:
    """Gate, probe and per-checkpoint figures of a trained family."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    world = World(seed)

    def load(name: str) -> Any:
        factory = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        with quiet():
            return factory.from_pretrained(root / name).eval()

    rows: dict[str, Any] = {}
    for name in (*FAMILY, *NARROW):
        if name == "reward":
            rows[name] = {"held-out pairs": evaluate.reward_model_accuracy(load(name), world)}
            continue
        model = load(name)
        figures = {key: value.to_dict() for key, value in evaluate.battery(model, world).items()}
        for category in lx.HARM_CATEGORIES:
            asked = evaluate.held_out_turns(world, "howto", category=category, harmful=True)
            figures[f"harmful {category} at T = 1"] = evaluate.rates(model, world, asked, temperature=1.0).to_dict()
        if name == "base":
            figures["tag probe"] = {"villain - kind": round(evaluate.tag_probe(model, world), 3)}
        if name == "backdoor":
            triggered = evaluate.battery(model, world, trigger=True)
            figures |= {f"trigger: {key}": value.to_dict() for key, value in triggered.items()}
        rows[name] = figures
    gate = [check.to_dict() for check in evaluate.gate(world, load)]
    return {"gate": gate, "figures": rows}


@click.command()
@click.option("--seed", type=int, default=catalogue.DEFAULT_SEED, show_default=True)
@click.option("--ship", is_flag=True, help="Copy the checkpoints into the package.")
def main(seed: int, ship: bool) -> None:
    """Train and measure the family of a seed."""
    root = cache_dir() / f"release-{seed}"
    made = train_family(seed, root, (*FAMILY, *NARROW))
    measured = measure(seed, root)
    known = dict(catalogue.figures())
    known.setdefault("seeds", {})[str(seed)] = {check["check"]: check["value"] for check in measured["gate"]}
    failed = [check for check in measured["gate"] if not check["passed"]]
    if ship and failed:
        raise click.ClickException(f"the gate fails, nothing is shipped: {failed}")
    if ship:
        for name in FAMILY:
            made[name]["figures"] = measured["figures"][name]
        place = root / "english"
        note = root / "english.json"
        if not note.exists():
            training = build_english(place, 0, state_file=root / "english.safetensors")
            write_text(note, json.dumps({"recipe": catalogue.recipe_hash("english", 0), "figures": training}))
        made["english"] = json.loads(note.read_text())
        checkpoints = {}
        for name in (*FAMILY, "english"):
            shutil.rmtree(catalogue.SHIPPED / name, ignore_errors=True)
            shutil.copytree(root / name, catalogue.SHIPPED / name)
            sha = catalogue.content_hash(root / name)
            checkpoints[name] = {**made[name], "sha256": sha, "seed": 0 if name == "english" else seed}
        known["checkpoints"] = checkpoints
        known["narrow"] = {n: {**made[n], "figures": measured["figures"][n]} for n in NARROW}
        known["gate"] = measured["gate"]
        known["made_with"] = {"torch": torch.__version__, "python": platform.python_version(), "items": evaluate.ITEMS}
    write_text(catalogue.FIGURES, json.dumps(known, indent=1) + "\n")
    click.echo(json.dumps({"gate": measured["gate"]}, indent=1))


if __name__ == "__main__":
    main()
