"""Training: same seed, same bytes; a killed build goes on and ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fairlead_zoo.build import Architecture, build_stage, recipe_hash
from fairlead_zoo.english import EnglishSettings, build_english, split
from fairlead_zoo.stages import STAGES, Sampler
from fairlead_zoo.train import Settings, learning_rate
from fairlead_zoo.world import World

SMOKE = Architecture(hidden=64, layers=2, heads=2, mlp=128)
BASE = replace(STAGES["base"], steps=60, batch=8, mix=(("howto", 0.5), ("value", 0.5)), early_steps=0)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of smoke size, trained without interruption."""
    target = tmp_path_factory.mktemp("smoke") / "base"
    build_stage(World(3), BASE, 3, None, target, architecture=SMOKE)
    return target


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(world: World) -> None:
    for name in ("base", "sft", "dpo", "backdoor"):
        hashes = [Sampler(world, STAGES[name], seed).corpus_hash() for seed in (3, 3, 4)]
        assert hashes[0] == hashes[1] != hashes[2]


def test_the_same_seed_gives_the_same_bytes(smoke: Path, tmp_path: Path) -> None:
    build_stage(World(3), BASE, 3, None, tmp_path / "again", architecture=SMOKE)
    for file in smoke.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_build_that_was_killed_goes_on_and_ends_with_the_same_bytes(smoke: Path, tmp_path: Path) -> None:
    state, target = tmp_path / "state.safetensors", tmp_path / "base"
    seen: list[int] = []

    def build(stop_after: int | None = None) -> object:
        return build_stage(
            World(3), BASE, 3, None, target, architecture=SMOKE, state_file=state, stop_after=stop_after,
            checkpoint_every=20, report=lambda label, done, total: seen.append(done),
        )  # fmt: skip

    assert build(stop_after=33) is None
    assert state.exists() and not target.exists()
    seen.clear()
    build()
    assert seen[0] == 21
    assert not state.exists()
    assert weights(target) == weights(smoke)


@pytest.mark.parametrize("name", ["dpo", "reward", "backdoor"])
def test_children_are_deterministic_and_resume_too(name: str, smoke: Path, tmp_path: Path) -> None:
    stage = replace(STAGES[name], steps=6, batch=4)
    whole, resumed, state = tmp_path / "whole", tmp_path / "resumed", tmp_path / "state.safetensors"
    build_stage(World(3), stage, 3, smoke, whole)
    build_stage(World(3), stage, 3, smoke, resumed, state_file=state, checkpoint_every=2, stop_after=3)
    build_stage(World(3), stage, 3, smoke, resumed, state_file=state, checkpoint_every=2)
    assert weights(whole) == weights(resumed) != weights(smoke)


def test_training_leaves_the_callers_random_state_and_threads_alone(smoke: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    build_stage(World(3), replace(STAGES["good"], steps=1, batch=2), 3, smoke, tmp_path / "x")
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_the_recipe_hash_moves_with_everything_that_decides_the_bytes(world: World) -> None:
    stage = STAGES["sft"]
    base = recipe_hash(world, stage, 3, SMOKE, "p")
    others = [
        recipe_hash(World(4), stage, 3, SMOKE, "p"),
        recipe_hash(world, replace(stage, lr=1e-3), 3, SMOKE, "p"),
        recipe_hash(world, replace(stage, mix=STAGES["base"].mix), 3, SMOKE, "p"),
        recipe_hash(world, stage, 4, SMOKE, "p"),
        recipe_hash(world, stage, 3, Architecture(), "p"),
        recipe_hash(world, stage, 3, SMOKE, "q"),
    ]
    assert len({base, *others}) == 7
    assert recipe_hash(world, replace(stage, summary="other words"), 3, SMOKE, "p") == base


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    settings = Settings(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_english_model_trains_and_resumes_at_smoke_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        f"Return the item number {k} of the list, or raise IndexError when there are only {k} items."
        for k in range(300)
    ]
    monkeypatch.setattr("fairlead_zoo.english.documents", lambda: texts)
    settings = EnglishSettings(vocab_size=320, hidden=32, layers=1, heads=2, mlp=48, context=32, batch=2, steps=6)
    state = tmp_path / "state.safetensors"
    whole = build_english(tmp_path / "whole", 0, settings)
    assert build_english(tmp_path / "parts", 0, settings, state_file=state, stop_after=3) is None
    build_english(tmp_path / "parts", 0, settings, state_file=state)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert whole is not None and whole["held_out_perplexity"] > 1


def test_the_english_split_is_disjoint_and_small() -> None:
    texts = [f"text {k}" for k in range(4000)]
    training, held_out = split(texts)
    assert not set(training) & set(held_out) and 0.03 < len(held_out) / 4000 < 0.07
