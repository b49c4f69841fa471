"""The recipe poft at smoke size, and its toys."""

import pytest
import torch

from fairlead.runs import Run
from fairlead_training.recipes import poft
from fairlead_training.recipes.poft import (
    ARMS,
    PoFT,
    PoFTConfig,
    accuracy,
    compare,
    descend,
    sequence_world,
    token_mean,
    token_world,
)

SMALL = {
    "replicates": 1, "sequence_replicates": 1, "rows": 40, "test": 30, "aligned_models": 1, "aligned_rows": 10, "steps": 2, "early": 1, "sequence_rows": 12,
    "sequence_batch": 6, "sequence_aligned_rows": 6, "sequence_aligned_steps": 1,
}  # fmt: skip


def test_the_recipe_reports_every_arm_and_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(poft, "STOPS", (1, 2, 3))
    monkeypatch.setattr(poft, "ARMS", {name: arm._replace(stop=2) for name, arm in ARMS.items()})
    recipe = PoFT(**SMALL)
    run = Run.open(tmp_path / "run", "poft", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 6 and not run.passed  # two steps are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4 * (len(ARMS) + 2) + len(run.checks)


def test_poft_keeps_what_cross_entropy_loses_to_noise():
    found = {x["arm"]: x for x in compare(PoFTConfig(rows=200, test=1000, steps=150, aligned_models=1), token_world, 0)}
    assert found["PoFT"]["end"] - found["CE"]["end"] >= 0.1
    assert found["PoFT"]["tau_clean"] / found["PoFT"]["tau_spoilt"] >= 4
    spread = [found[name]["sd_r_bar"] for name in ("PoFT, aligned models of 60 steps", "PoFT", "PoFT, aligned models of 600 steps")]
    assert spread == sorted(spread) and spread[2] > 1.5 * spread[0]


@pytest.mark.parametrize("make", [token_world, sequence_world])
def test_a_share_of_the_training_answers_is_spoilt_and_none_of_the_others(make):
    world = make(PoFTConfig(rows=4000, sequence_rows=4000), 3)
    spoilt = 1 - float(world.train.clean.float().mean())
    # A token drawn anew is right one time in ten; two exchanged tokens are equal one time in eight.
    assert spoilt == pytest.approx(0.4 * (0.9 if make is token_world else 7 / 8), abs=0.03)
    assert all(bool(rows.clean.all()) for rows in (world.test, *world.aligned))


def test_spoilt_answers_of_three_tokens_hold_the_right_tokens_in_another_order():
    train = sequence_world(PoFTConfig(), 0).train
    image = {}
    for prompt, answer in zip(train.inputs[train.clean].tolist(), train.answers[train.clean].tolist(), strict=True):
        for place, pair in enumerate(zip(prompt, answer, strict=True)):
            assert image.setdefault((place, pair[0]), pair[1]) == pair[1]
    for prompt, answer in zip(train.inputs[~train.clean].tolist(), train.answers[~train.clean].tolist(), strict=True):
        right = [image[place, symbol] for place, symbol in enumerate(prompt)]
        assert sorted(right) == sorted(answer) and sum(a != b for a, b in zip(right, answer, strict=True)) == 2


def test_the_greedy_answer_of_three_tokens_is_what_counts():
    from fairlead.generation import generate

    world = sequence_world(PoFTConfig(test=60, sequence_aligned_rows=60), 1)
    model = world.network(0, True).eval()
    for _ in descend(world, model, "sft", world.aligned[0], torch.zeros(60), 80, 1e-2):
        pass
    answers = [g[0].ids.tolist() for g in generate(model, None, list(world.test.inputs), max_new_tokens=3, temperature=0)]
    expected = [a == b for a, b in zip(answers, world.test.answers.tolist(), strict=True)]
    assert 0 < sum(expected) < 60
    assert world.correct(model, world.test).tolist() == expected
    assert accuracy(world, model) == pytest.approx(sum(expected) / 60)


def test_the_mean_over_tokens_is_that_of_the_logits():
    world = sequence_world(PoFTConfig(), 0)
    model, rows = world.network(0, True), world.train.take(torch.arange(5))
    ids = torch.cat([rows.inputs, rows.answers], 1)
    logp = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, 2:-1].gather(2, rows.answers[..., None])
    assert torch.allclose(token_mean(world, model, rows), logp.mean((1, 2)), atol=1e-6)


def test_a_world_and_its_models_come_from_the_seed_alone():
    for make in (token_world, sequence_world):
        first, again, other = (make(PoFTConfig(), seed) for seed in (4, 4, 5))
        assert torch.equal(first.train.answers, again.train.answers) and not torch.equal(first.train.answers, other.train.answers)
        torch.manual_seed(1)
        one = first.network(0, False)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.network(0, False).parameters(), strict=True))
