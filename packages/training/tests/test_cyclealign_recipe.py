"""The recipe cyclealign at smoke size, and its simulated rankers by hand."""

import math

import numpy as np
import pytest

from fairlead.runs import Run
from fairlead_training.rankers import Demonstration
from fairlead_training.recipes.cyclealign import (
    ARMS,
    STATIC,
    CycleAlign,
    CycleAlignConfig,
    TabularLoop,
    exact,
    loops_of,
    right_pairs,
)

SMALL = {"simulations": 1, "lists": 20, "worlds": 2, "prompts": 6, "answers": 4, "n": 3, "iterations": 3}


def test_the_recipe_reports_every_arm_and_threshold(tmp_path):
    recipe = CycleAlign(**SMALL)
    run = Run.open(tmp_path / "run", "cyclealign", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 7 + 9 and not run.passed  # twenty lists are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()


def test_right_pairs_are_counted_over_all_lists():
    quality = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert right_pairs(quality, [[0, 1, 2], [0, 1]]) == 3 / 4
    assert math.isnan(right_pairs(quality, [[0], []]))
    assert [right_pairs([[3.0, 2.0, 1.0, 0.0]], [d.ranking]) for d in STATIC] == [0.5, 0.5]


def test_a_pair_is_right_more_than_half_of_the_time_by_the_closed_form():
    assert exact(0.8) == pytest.approx(0.7852, abs=1e-4) and exact(1.2) == pytest.approx(0.7211, abs=1e-4)


def test_the_black_box_hears_better_the_more_right_its_demonstrations_are():
    world = TabularLoop(CycleAlignConfig(**SMALL), 0)
    world.sample(["0"], 3)
    world.known["0"], world.black_noise[0] = [1.0, 0.0, -9.0, -9.0], [0.0, 1.5, 0.0, 0.0]
    best, worst = (Demonstration("static 0", ("0", "1"), order) for order in ((0, 1), (1, 0)))
    assert world.rank("0", ["0", "1", "2"], [best]) == [0, 1, 2]  # noise 0.4 * 1.5 against a gap of 1
    assert world.rank("0", ["0", "1", "2"], [worst]) == [1, 0, 2]  # noise 1.2 * 1.5
    assert world.rank("0", ["0", "1", "2"], [best, worst]) == [1, 0, 2]  # noise 0.8 * 1.5


def test_arms_start_from_the_same_world_and_the_same_draws():
    rows = {row["arm"]: row for row in loops_of(CycleAlignConfig(**SMALL), 3)}
    assert set(rows) == set(ARMS) and len({row["quality"][0] for row in rows.values()}) == 1
    first = {(row["quality"][1], row["accuracy"][0]) for arm, row in rows.items() if arm.startswith("agreement") and "shuffled" not in arm}
    assert len(first) == 1  # no dynamic demonstration is there in the first iteration
    assert rows["agreement, dynamic"]["hinges"] == [0, 0, 0] and max(rows["black box, dynamic"]["hinges"]) > 0


def test_training_raises_what_is_ranked_first():
    world = TabularLoop(CycleAlignConfig(**SMALL), 1)
    world.sample(["0", "1"], 3)
    before = world.logits.softmax(-1)
    world.train([{"prompt": "1", "completions": ["2", "0"], "ranks": [0, 1]}])
    after = world.logits.softmax(-1)
    assert after[1, 2] > before[1, 2] and after[1, 0] < before[1, 0]
    assert bool((after[[0, 2, 3, 4, 5]] == before[[0, 2, 3, 4, 5]]).all())
