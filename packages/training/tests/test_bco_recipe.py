"""The recipe bco at smoke size, and the unpaired side of its tabular world by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from fairlead.runs import Run
from fairlead_training.recipes.bco import Bco, BcoConfig, compare, match
from fairlead_training.recipes.tabular import (
    Rows,
    World,
    divergence,
    drawn_rows,
    train_rows,
    unpaired,
    win_rate,
    win_rates,
    world,
)


def test_the_recipe_reports_every_table_and_threshold(tmp_path: Path) -> None:
    recipe = Bco(worlds=1, tilted_worlds=2, prompts=12, answers=3, pairs=60, rows=60, steps=2)
    run = Run.open(tmp_path / "run", "bco", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 7 and not run.passed  # two steps are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_the_shift_brings_unpaired_labels_up_to_dpo_and_kto_stays_behind() -> None:
    rate = {(x["objective"], x["shares"]): x["win_rate"] for x in compare(BcoConfig(), 0, lambda *_: None)}
    assert rate["bco", "1 : 1"] - rate["bce", "1 : 1"] >= 0.04 and rate["bco", "1 : 1"] - rate["dpo", "pairs"] >= -0.04
    for shares in ("1 : 0.25", "0.25 : 1"):
        assert rate["bco", shares] - rate["bce", shares] >= 0.01
    assert rate["bco", "1 : 1"] - rate["kto", "1 : 1"] >= 0.04


@pytest.mark.slow
def test_density_ratios_win_back_what_tilted_prompts_cost() -> None:
    found = {x["arm"]: (x["all"], x["rare"]) for x in match(BcoConfig(), 0, lambda *_: None)}
    for plain, tilted, mended, least in zip(found["not tilted"], found["w = 1"], found["w clamped"], (1 / 2, 1 / 3), strict=True):
        assert plain - tilted > 0.05 and mended - tilted >= least * (plain - tilted)


def test_unpaired_rows_are_the_winners_of_the_first_and_the_losers_of_the_last_pairs() -> None:
    place = world(0, pairs=10)
    rows = unpaired(place, 4, 3)
    assert rows.up.tolist() == [True] * 4 + [False] * 3
    assert torch.equal(rows.prompt, torch.cat([place.pairs[:4, 0], place.pairs[7:, 0]]))
    assert torch.equal(rows.answer, torch.cat([place.pairs[:4, 1], place.pairs[7:, 2]]))


def test_drawn_rows_follow_the_laws_of_their_prompts_and_ups_are_better() -> None:
    place = world(1, prompts=3)
    rows = drawn_rows(place, torch.tensor([1.0, 1.0, 2.0]), torch.tensor([3.0, 0.0, 1.0]), 8000, 0)
    found = [torch.bincount(rows.prompt[mask], minlength=3) / 8000 for mask in (rows.up, ~rows.up)]
    assert torch.stack(found).flatten().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.75, 0, 0.25], abs=0.02)
    quality = place.quality[rows.prompt, rows.answer]
    assert float(quality[rows.up].mean()) > float(quality[~rows.up].mean()) + 0.3


def test_training_on_rows_goes_where_the_gradient_of_all_rows_goes() -> None:
    place = World(torch.zeros(1, 2).double(), torch.tensor([[1.0, 0.0]]).double(), torch.zeros(0, 3, dtype=torch.int64))
    rows = Rows(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, True, True]))
    policy = train_rows(place, rows, "bco", delta=0.0, beta=1.0, steps=300, learning_rate=0.1)
    logp = policy.log_softmax(-1)[0].requires_grad_(True)
    u = logp - torch.tensor(0.5).double().log()
    loss = -(2 * logsigmoid(u[0]) + logsigmoid(u[1])) / 3 - logsigmoid(-u[0])
    (slope,) = torch.autograd.grad(loss, logp)
    p = logp.detach().exp()
    assert torch.allclose(slope - p * slope.sum(), torch.zeros(2).double(), atol=1e-4)  # stationary in the logits
    assert abs(float(policy[0, 0] - policy[0, 1])) > 0.1


def test_kto_takes_the_answer_of_the_row_before_as_mismatched() -> None:
    place = World(torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), torch.zeros(0, 3, dtype=torch.int64))
    prompts, wanted = torch.tensor([0, 1] * 3), torch.ones(6, dtype=torch.bool)

    def moved(answers: list[int]) -> bool:
        rows = Rows(prompts, torch.tensor(answers), wanted)
        free, fixed = (train_rows(place, rows, "kto", steps=60, beta=1.0, **s) for s in ({}, {"z0": 0.0}))
        return not torch.allclose(free, fixed, atol=1e-3)

    assert not moved([0, 2, 0, 2, 1, 1])  # most answers of the other prompt lose: the zero point is held at 0
    assert moved([0, 0, 0, 0, 1, 1])


def test_the_mean_of_the_win_rates_is_the_win_rate_and_the_reference_has_no_divergence() -> None:
    place = world(3, prompts=5)
    policy = place.reference + place.quality
    assert float(win_rates(place, policy).mean()) == pytest.approx(win_rate(place, policy))
    assert bool((win_rates(place, policy) > 0.5).all())
    assert divergence(place, place.reference) == pytest.approx(0) and divergence(place, policy) > 0.1
