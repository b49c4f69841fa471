"""The recipe preference-losses at smoke size, and its tabular world by hand."""

import pytest
import torch

from fairlead.runs import Run
from fairlead_training.recipes.preference_losses import MEASURED, PreferenceLosses
from fairlead_training.recipes.tabular import World, train_pairs, win_rate, world


def test_the_recipe_reports_every_objective_and_threshold(tmp_path):
    recipe = PreferenceLosses(worlds=1, prompts=4, answers=3, pairs=60, steps=2)
    run = Run.open(tmp_path / "run", "preference-losses", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 2 * len(MEASURED) + 3 and not run.passed  # two steps are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()


def test_the_win_rate_is_a_half_at_the_reference_and_counts_ties_half():
    place = world(0, prompts=5, answers=4, pairs=10)
    assert win_rate(place, place.reference) == pytest.approx(0.5)
    tied = World(torch.zeros(1, 3).double(), torch.tensor([[0.0, 1.0, 1.0]]).double(), place.pairs)
    # The policy gives answer 1 alone: it beats answer 0 (a third) and ties with two (a third).
    assert win_rate(tied, torch.tensor([[-99.0, 99.0, -99.0]]).double()) == pytest.approx(2 / 3)


def test_swapping_every_label_turns_every_pair_round():
    plain, turned = world(3), world(3, swapped=1.0)
    assert torch.equal(plain.pairs[:, [0, 2, 1]], turned.pairs) and torch.equal(plain.quality, turned.quality)


def test_counting_equal_pairs_gives_the_policy_of_all_pairs():
    place = World(torch.zeros(1, 2).double(), torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0, 0, 1]] * 3 + [[0, 1, 0]]))
    gap = train_pairs(place, "dpo", steps=2000, beta=1.0) @ torch.tensor([1.0, -1.0]).double()
    assert float(gap[0]) == pytest.approx(float(torch.tensor(3.0).log()), abs=1e-3)  # three wins to one
