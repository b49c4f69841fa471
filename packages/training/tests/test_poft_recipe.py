"""The recipe poft at smoke size, and its toys."""

import pytest
import torch

from fairlead.runs import Run
from fairlead_training.recipes import poft
from fairlead_training.recipes.poft import PARTS, PoFT, PoFTConfig, accuracy, compare, network, token_mean, world


def test_the_recipe_reports_every_arm_and_threshold(tmp_path, monkeypatch):
    for name, part in PARTS.items():
        arms = {arm: how._replace(stop=min(how.stop // 60, 3)) for arm, how in part.arms.items()}
        monkeypatch.setitem(poft.PARTS, name, part._replace(arms=arms))
    recipe = PoFT(replicates=1, rows=40, test=30, aligned_models=1, aligned_rows=10, sequence_aligned_rows=10, steps=2, early=1)
    run = Run.open(tmp_path / "run", "poft", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 6 and not run.passed  # two steps are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()
    written = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f'"arm": "{arm}"' in written for part in PARTS.values() for arm in part.arms)


def test_poft_keeps_what_cross_entropy_loses_to_noise():
    config = PoFTConfig(rows=200, test=1000, steps=150, aligned_models=1)
    found = {x["arm"]: x for x in compare(config, PARTS["one token"], 0)}
    assert found["PoFT"]["end"] - found["CE"]["end"] >= 0.1
    assert found["PoFT"]["tau_clean"] / found["PoFT"]["tau_spoilt"] >= 4
    spread = [found[name]["sd_r_bar"] for name in ("PoFT, aligned models of 60 steps", "PoFT", "PoFT, aligned models of 600 steps")]
    assert spread == sorted(spread) and spread[2] > 1.5 * spread[0]


@pytest.mark.parametrize(("part", "wrong"), [("one token", 0.4 * 9 / 10), ("three tokens", 0.4 * 5 / 6)])
def test_a_share_of_the_training_answers_is_spoilt_and_none_of_the_others(part, wrong):
    place = world(PoFTConfig(rows=4000), PARTS[part], 3)
    # A token drawn anew is right one time in ten; two exchanged tokens are equal one time in six, or a little more often.
    assert 1 - float(place.train.clean.float().mean()) == pytest.approx(wrong, abs=0.03)
    assert all(bool(rows.clean.all()) for rows in (place.test, *place.aligned))


def test_spoilt_answers_of_three_tokens_hold_the_right_tokens_in_another_order():
    spoilt, clean = (world(PoFTConfig(noise=noise), PARTS["three tokens"], 0).train for noise in (0.999, 1e-9))
    assert torch.equal(spoilt.features[..., :16], clean.features[..., :16]) and bool(clean.clean.all())
    assert torch.equal(spoilt.answers.sort(1).values, clean.answers.sort(1).values)
    assert set((spoilt.answers != clean.answers).sum(1).tolist()) == {0, 2}


def test_a_token_is_predicted_from_x_the_tokens_before_and_its_place():
    x = torch.randn(2, 16)
    made = poft.features(x, torch.tensor([[3, 7, 1], [0, 2, 9]]), 10)
    assert made.shape == (2, 3, 16 + 20 + 2)
    assert torch.equal(made[:, :, :16], x[:, None].expand(-1, 3, -1))
    ones = [[at.nonzero().flatten().tolist() for at in row] for row in made[:, :, 16:]]
    assert ones == [[[], [3, 20], [3, 17, 21]], [[], [0, 20], [0, 12, 21]]]
    assert torch.equal(poft.features(x, torch.tensor([[3], [0]]), 10)[:, 0], x)


def test_an_answer_is_right_when_greedy_decoding_gives_it():
    model, x = network(PARTS["three tokens"], 32, 0), torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    answer = torch.zeros(50, 3, dtype=torch.int64)
    for place in range(3):
        answer[:, place] = model(poft.features(x, answer, 6))[:, place].argmax(-1)
    changed = answer.clone()
    changed[:20, 1] = (changed[:20, 1] + 1) % 6
    everything = torch.ones(50, dtype=torch.bool)
    assert accuracy(model, poft.Rows(poft.features(x, answer, 6), answer, everything)) == 1
    assert accuracy(model, poft.Rows(poft.features(x, changed, 6), changed, everything)) == pytest.approx(0.6)


def test_the_mean_is_over_the_tokens_of_an_answer():
    rows = world(PoFTConfig(), PARTS["three tokens"], 0).train
    model = network(PARTS["three tokens"], 32, 0)
    expected = -torch.nn.functional.cross_entropy(model(rows.features).transpose(1, 2), rows.answers, reduction="none").mean(1)
    assert torch.allclose(token_mean(model, rows), expected, atol=1e-6)


def test_a_world_and_its_models_come_from_the_seed_alone():
    for part in PARTS.values():
        first, again, other = (world(PoFTConfig(), part, seed) for seed in (4, 4, 5))
        assert torch.equal(first.train.answers, again.train.answers) and not torch.equal(first.train.answers, other.train.answers)
        torch.manual_seed(1)
        one = network(part, 8, 0)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), network(part, 8, 0).parameters(), strict=True))
