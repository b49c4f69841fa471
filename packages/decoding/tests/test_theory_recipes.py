"""The recipes of the theory, at sizes of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairlead import registry
from fairlead.runs import Run
from fairlead_decoding import theory
from fairlead_decoding.recipes import bon_asymptotics, infalign

SMALL_BON = {"models": 1, "length": 3, "samples": 512, "lengths": (5, 10, 20)}
SMALL_INF = {"models": 1, "vocab": 4, "length": 3, "hidden": 32, "steps": 30, "free_steps": 10, "outcomes": 512, "draws": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(slug: str, directory: Path, seed: int, settings: dict[str, Any]) -> Run:
    recipe = registry.create("recipe", slug, **settings)
    opened = Run.open(directory, slug, recipe.config.public_dict(), seed)
    recipe(opened)
    opened.finish()
    return opened


def test_bon_asymptotics_holds_its_thresholds_and_draws_its_report(tmp_path: Path) -> None:
    done = run("bon-asymptotics", tmp_path, 4, SMALL_BON)
    assert done.passed, [c for c in done.checks if not c["passed"]]
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 4
    report = (tmp_path / "report.html").read_text()
    assert "What best-of-n really costs" in report and "nats" in report


def test_bon_asymptotics_is_deterministic_in_its_seed(tmp_path: Path) -> None:
    config = bon_asymptotics.BonAsymptoticsConfig(**SMALL_BON)
    one, two, other = (bon_asymptotics.measure_model(config, seed) for seed in (1, 1, 2))
    assert one == two and one != other


def test_the_first_model_has_the_divergences_of_the_exact_law() -> None:
    log_p, r = bon_asymptotics.reference(bon_asymptotics.BonAsymptoticsConfig(), 0)
    assert len(log_p) == 6**5 and float(np.exp(log_p).max()) == pytest.approx(0.936, abs=5e-4)
    assert float(theory.bon_kl_exact(log_p, r, 16)) < 0.5 * theory.bon_kl_bound(16)


def test_infalign_writes_a_report_and_resumes_from_its_stages(tmp_path: Path) -> None:
    done = run("infalign", tmp_path, 0, SMALL_INF)
    held = {c["name"]: c["passed"] for c in done.checks}
    assert all(passed for name, passed in held.items() if name.startswith("closed form"))
    stages = {p.stem for p in (tmp_path / "stages").glob("*.json")}
    assert stages == {"frontier", "universality", "train-0-identity", "train-0-exp-10", "train-0-exp--10"}
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "stages").iterdir()}
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    recipe = registry.create("recipe", "infalign", **SMALL_INF)
    again = Run.open(tmp_path, "infalign", recipe.config.public_dict(), 0, resume=True)
    recipe(again)
    assert again.checks == done.checks
    assert written == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "stages").iterdir()}
    assert "Train for the way the model is served" in (tmp_path / "report.html").read_text()


def test_training_reaches_the_optimum_that_exact_tilting_gives() -> None:
    config = infalign.InfAlignConfig(vocab=4, length=3, steps=150, free_steps=40)
    found = infalign.train(config, 0, "identity", lambda done, total: None)
    assert found["kl"] == pytest.approx(0.5, abs=0.02)
    assert found["rates"][0] == pytest.approx(theory.frontier("identity", kl=found["kl"]).standard, abs=0.03)
    assert len(found["path"]) == 150 and json.dumps(found)


def test_the_exact_error_is_that_of_many_sets_of_draws_and_sees_what_was_not_drawn() -> None:
    from fairlead_decoding.recipes.bon_asymptotics import exact_error

    p, r = np.array([0.5, 0.3, 0.19, 0.01]), np.array([0.0, 1.0, 1.5, 4.0])
    draws = np.random.default_rng(0).choice(r, size=(3000, 400), p=p)
    for n in (2, 4):
        spread = np.std(theory.best_of_n_reward(draws, n))
        assert exact_error(np.log(p), r, n, 400) == pytest.approx(float(spread), rel=0.1)
    rare = np.array([1 - 1e-6, 1e-6])
    assert exact_error(np.log(rare), np.array([0.0, 1.0]), 16, 4096) > 1e-4  # where the bootstrap of 4096 equal draws says 0
