"""Every name of the zoo: what it is, where its files are, how they are made when they are not there yet.

`resolve("base")` gives a local folder: from the wheel, from the cache, or built on the spot when that takes seconds.
`NAME@SEED` asks for another seed. Leaves to others: training (build, english, bigram), real models (real_models).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairlead.errors import DataUnavailableError, InputError, UnknownNameError

from . import real_models
from .files import cache_dir, write_text
from .stages import STAGES

if TYPE_CHECKING:
    from .train import Report

SHIPPED = Path(__file__).parent / "checkpoints"
FIGURES = SHIPPED / "figures.json"
DEFAULT_SEED = 3
LONG = {"base": 5, "english": 13}
"""Minutes of one thread that a build takes, for those that are never built unasked."""


@dataclass(frozen=True)
class Entry:
    """One thing in the zoo. kind: organism, language, closed-form, real or data; parents: nearest first."""

    name: str
    kind: str
    summary: str
    parents: tuple[str, ...] = ()
    parameters: int = 0
    seed: int | None = None
    license: str = "Apache-2.0"

    @property
    def shipped(self) -> bool:
        """Whether the wheel carries it."""
        return (SHIPPED / self.name / "model.safetensors").exists()


def _parents(name: str) -> tuple[str, ...]:
    parent = STAGES[name].parent
    return () if parent is None else (parent, *_parents(parent))


_FAMILY_PARAMETERS = 1_113_216
ENTRIES: dict[str, Entry] = {
    **{
        name: Entry(name, "organism", stage.summary, _parents(name), _FAMILY_PARAMETERS, DEFAULT_SEED)
        for name, stage in STAGES.items()
    },
    "english": Entry("english", "language", "English of Python's own documentation", (), 1_377_408, 0),
    "bigram": Entry("bigram", "closed-form", "256-token bigram model, rows Dirichlet(0.08), nothing trained", (), 0, 0),
    "prompts": Entry("prompts", "data", "held-out test prompts of the world (JSONL)", (), 0, DEFAULT_SEED),
    **{
        model.name: Entry(model.name, "real", model.summary, (), model.parameters, None, model.license)
        for model in real_models.REAL_MODELS.values()
    },
}


def get(name: str) -> Entry:
    """The entry of that name (without "zoo:" and "@seed"); UnknownNameError otherwise."""
    if name not in ENTRIES:
        raise UnknownNameError("zoo name", name, ENTRIES, hint="('fairlead zoo list' shows all)")
    return ENTRIES[name]


def parse(text: str) -> tuple[Entry, int | None]:
    """ "zoo:harm@7", "harm@7" or "harm" -> (entry, seed); None is the entry's own seed or a real model."""
    name, at, tail = text.removeprefix("zoo:").partition("@")
    entry = get(name)
    if not at:
        return entry, entry.seed
    if entry.seed is None:
        raise InputError(f"zoo:{name} has no seed; leave out '@{tail}'")
    if not tail.isdigit():
        raise InputError(f"seed must be a whole number, got {tail!r} in {text!r}")
    return entry, int(tail)


@lru_cache(maxsize=1)
def figures() -> dict[str, Any]:
    """The seed table and gate figures that ship with the checkpoints; {} before anything is shipped."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}


def recipe_hash(name: str, seed: int) -> str:
    """Hash of everything that decides a built entry's bytes; a shipped one keeps the hash it was built under."""
    entry = get(name)
    if entry.shipped and seed == entry.seed:
        return str(figures()["checkpoints"][name]["recipe"])
    if name in STAGES:
        from .build import STANDARD
        from .build import recipe_hash as stage_hash
        from .world import World

        parent = STAGES[name].parent
        return stage_hash(World(seed), STAGES[name], seed, STANDARD, recipe_hash(parent, seed) if parent else "")
    if name == "english":
        import sysconfig

        import torch

        from .english import EnglishSettings

        recipe: list[Any] = [vars(EnglishSettings()), torch.__version__.split("+")[0], sysconfig.get_python_version()]
    elif name == "prompts":
        from . import prompts
        from .world import World

        recipe = [prompts.VERSION, prompts.COUNTS, World(seed).vocabulary()]
    else:
        recipe = ["bigram", 1]
    return hashlib.sha256(json.dumps([name, seed, recipe], sort_keys=True).encode()).hexdigest()[:16]


def location(name: str, seed: int | None) -> Path:
    """Where an entry's files are, or would be."""
    entry = get(name)
    if entry.kind == "real":
        return cache_dir() / name
    seed = entry.seed if seed is None else seed
    if entry.shipped and seed == entry.seed:
        return SHIPPED / name
    folder = cache_dir() / f"{name}-{seed}-{recipe_hash(name, seed or 0)}"
    return folder.with_suffix(".jsonl") if entry.kind == "data" else folder


def is_here(name: str, seed: int | None = None) -> bool:
    """Whether the files are on this machine already."""
    return real_models.is_here(name) if get(name).kind == "real" else location(name, seed).exists()


def resolve(text: str) -> Path:
    """The local folder (or JSONL file) of "zoo:NAME[@SEED]", built on first use when that takes seconds.

    UnknownNameError (did you mean), InputError for a bad seed, DataUnavailableError with the command to run when the
    files would take minutes to train or a package is missing.
    """
    entry, seed = parse(text)
    if entry.kind == "real":
        return real_models.find(entry.name)
    here = location(entry.name, seed)
    if here.exists():
        return here
    for name in (entry.name, *entry.parents):
        if name in LONG and not location(name, seed).exists():
            raise DataUnavailableError(
                f"zoo:{name}@{seed} is not trained yet (about {LONG[name]} minutes of one thread); "
                f"run: fairlead zoo build {name} --seed {seed}"
            )
    return build(entry.name, seed)


def build(name: str, seed: int | None = None, *, force: bool = False, report: Report | None = None) -> Path:
    """Make an entry's files in the cache (parents first) and return the place; `force` trains again what is there.

    A build that was killed goes on where it stopped. The wheel's own files are never touched: a forced build of a
    shipped checkpoint lands in the cache, under the recipe's hash on this machine.
    """
    entry = get(name)
    if entry.kind == "real":
        return real_models.find(name)
    seed = entry.seed if seed is None else seed
    target = location(name, seed)
    if target.exists() and not force:
        return target
    if target.parent == SHIPPED:
        target = cache_dir() / f"{name}-{seed}-rebuilt"
    number = seed or 0
    if entry.kind == "data":
        from .prompts import write_prompts
        from .world import World

        write_prompts(World(number), target)
        return target
    state = cache_dir() / "training" / f"{target.name}.safetensors"
    made: dict[str, Any] | None
    if entry.kind == "closed-form":
        from .bigram import build_bigram

        made = build_bigram(target, number)
    elif entry.kind == "language":
        from .english import build_english

        made = build_english(target, number, state_file=state, report=report)
    else:
        from .build import build_stage
        from .world import World

        stage = STAGES[name]
        parent = build(stage.parent, seed, report=report) if stage.parent else None
        made = build_stage(World(number), stage, number, parent, target, state_file=state, report=report)
    write_text(target / "build.json", json.dumps(made, sort_keys=True) + "\n")
    return target


def size(name: str, seed: int | None = None) -> int:
    """Bytes on disk, 0 where nothing is there."""
    if get(name).kind == "real":
        if not real_models.is_here(name):
            return 0
        place = location(name, None)
    else:
        place = location(name, seed)
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0


def content_hash(folder: Path) -> str:
    """SHA-256 of the weights (or of a data file)."""
    file = folder if folder.is_file() else folder / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def clear(name: str, seed: int | None = None) -> None:
    """Remove a cached build (never a shipped one)."""
    place = location(name, seed)
    if place.parent == SHIPPED:
        return
    if place.is_dir():
        shutil.rmtree(place)
    elif place.exists():
        os.unlink(place)
