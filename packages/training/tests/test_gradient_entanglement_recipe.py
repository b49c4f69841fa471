"""The recipe gradient-entanglement at smoke size, its pairs, its log-probabilities and its steps by hand."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from fairlead.runs import Run
from fairlead.testing import tiny_model
from fairlead_training.recipes.gradient_entanglement import (
    PROMPT,
    GradientEntanglement,
    chain,
    logps,
    looked_at,
    normalised,
    suffix_pairs,
    supervised,
    text_pairs,
    trained,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_recipe_reports_every_threshold(tmp_path):
    recipe = GradientEntanglement(models=1, pairs=3, sft_steps=1, steps=2, text_sft_steps=1, text_steps=2)
    run = Run.open(tmp_path / "run", "gradient-entanglement", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 7 and not run.passed  # two steps move too little for the thresholds
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "figures" / "changes.svg").exists()
    assert (tmp_path / "run" / "stages" / "model-0.json").exists()


def test_pairs_with_a_suffix_differ_in_one_token():
    ids, length = suffix_pairs(5, 3, rng())
    assert ids.shape == (10, PROMPT + 4) and length.tolist() == [4] * 10
    differs = ids[:5] != ids[5:]
    assert differs.sum() == 5 and bool(differs[:, PROMPT].all())


def test_pairs_of_text_share_the_shorter_answer_behind_their_first_tokens():
    ids, length = text_pairs(50, chain(rng()), (2, 5), rng(1))
    assert length.tolist() == [3] * 50 + [6] * 50
    chosen, rejected = ids.chunk(2)
    assert torch.equal(chosen[:, :PROMPT], rejected[:, :PROMPT])
    assert bool((chosen[:, PROMPT] != rejected[:, PROMPT]).all())
    assert torch.equal(chosen[:, PROMPT + 1 : PROMPT + 3], rejected[:, PROMPT + 1 : PROMPT + 3])
    assert not bool(chosen[:, PROMPT + 3 :].any())  # padding


def test_the_text_continues_from_the_last_token_of_the_prompt():
    always_next = torch.eye(60).roll(1, dims=1)
    ids, _ = text_pairs(4, always_next, (2, 2), rng())
    assert torch.equal(ids[:, PROMPT + 1], (ids[:, PROMPT - 1] + 1) % 60)
    assert torch.allclose(chain(rng()).sum(1), torch.ones(60))


def test_padding_does_not_change_a_log_probability():
    model = tiny_model()
    pairs = text_pairs(2, chain(rng()), (2, 5), rng(1))
    alone = pairs._replace(ids=pairs.ids[:2, : PROMPT + 3], length=pairs.length[:2])
    with torch.no_grad():
        torch.testing.assert_close(logps(model, pairs)[:2], logps(model, alone))


def test_a_normalised_step_is_as_long_as_asked_and_parts_the_two():
    model = copy.deepcopy(tiny_model())
    pairs = text_pairs(4, chain(rng()), (2, 6), rng(1))
    logp = logps(model, pairs)
    parameters = list(model.parameters())
    move = normalised(logp, parameters, 1e-3)
    assert float(sum(m.square().sum() for m in move)) ** 0.5 == pytest.approx(1e-3, rel=1e-4)
    slopes = []
    for side in logp.chunk(2):
        grads = torch.autograd.grad(side.mean(), parameters, retain_graph=True)
        slopes.append(float(sum((g * m).sum() for g, m in zip(grads, move, strict=True))))
    assert slopes[0] > 0 > slopes[1]


def test_one_small_step_of_dpo_does_what_the_gradients_say():
    draw = partial(suffix_pairs, t=2, rng=rng())
    model = supervised(draw, 2, 0)
    pairs = draw(6)
    found = looked_at(model, pairs, 0.1)
    moved = trained("dpo", model, pairs, 0.1, 1, 1e-3)
    assert moved["dpo_w"] == pytest.approx(1e-3 * found["predicted_ds_w"], rel=0.05)
    assert moved["dpo_l"] == pytest.approx(1e-3 * found["predicted_ds_l"], rel=0.05)
