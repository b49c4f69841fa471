"""The recipe aft at smoke size, and its two toys."""

from __future__ import annotations

import copy

import pytest
import torch

from fairlead.runs import Run
from fairlead_training.recipes.aft import (
    LOSSES,
    Aft,
    AftConfig,
    chain_logp,
    compare,
    network,
    noisy,
    sample_chains,
    sums,
    train,
)

SMALL = {
    "sums_seeds": 1, "noisy_seeds": 2, "chains": 3, "width": 4, "sums_prompts": 9, "sums_vft_steps": 1, "sums_steps": 1, "noisy_width": 4,
    "noisy_prompts": 9, "noisy_test": 5, "noisy_vft_steps": 1, "noisy_steps": 1,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_recipe_reports_every_loss_and_threshold(tmp_path):
    recipe = Aft(**SMALL)
    run = Run.open(tmp_path / "run", "aft", recipe.config.model_dump(), 1)
    recipe(run)
    run.finish()
    assert len(run.checks) == 9 and not run.passed  # a step is too little for the thresholds
    assert sorted(p.stem for p in (tmp_path / "run" / "stages").iterdir()) == ["noisy-0", "noisy-1", "sums-0"]
    assert (tmp_path / "run" / "report.html").exists()


def test_one_model_meets_the_thresholds_of_the_sums():
    found = {row["loss"]: row for row in compare(AftConfig(), "sums", 0)}
    for name in ("detached", "boundary"):
        assert found[name]["assessment"] >= found["vft"]["assessment"] + 0.15
        assert found[name]["accuracy"] >= max(found["rrhf"]["accuracy"] + 0.15, found["plain"]["accuracy"] + 0.01)
    assert found["before"]["accuracy"] < 0.6 and found["vft"]["accuracy"] > 0.98


def test_the_sums_are_right_and_new_questions_are_the_others():
    toy = sums(AftConfig(), generator())
    abc = toy.x_QD.reshape(-1, 3, 7).argmax(2)
    assert torch.equal(toy.gold_Q, abc.sum(1) % 7) and torch.equal(toy.reference_Q2[:, 0], abc[:, :2].sum(1) % 7)
    assert len(toy.x_QD) == 250 and len(torch.cat([toy.x_QD, toy.new_x]).unique(dim=0)) == 343


def test_noise_is_in_the_reference_chains_alone():
    clean, toy = (noisy(AftConfig(noisy_share=share), generator(3)) for share in (0.0, 0.3))
    assert torch.equal(clean.gold_Q, toy.gold_Q) and torch.equal(clean.reference_Q2[:, 1], clean.gold_Q) and len(toy.new_x) == 2000
    changed = (clean.reference_Q2 != toy.reference_Q2).any(1).float().mean()
    assert 0.25 < float(changed) <= 0.3  # of 120 random chains of two tokens one in 64 stays as it was


def test_sampled_chains_are_different_and_follow_the_model():
    toy = sums(AftConfig(sums_prompts=2), generator())
    torch.manual_seed(0)
    model = network(29, 8, 2, 7)
    chains = sample_chains(model, toy, 4000, generator())
    assert len(chains) == len(chains.unique(dim=0)) == 98  # each of 49 chains of both questions
    whole = chain_logp(model, toy, chains[:, 0], chains[:, 1:]).detach().exp()
    assert float(whole.sum()) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_question_with_one_chain_alone_still_learns_its_reference(name):
    toy = sums(AftConfig(sums_prompts=2), generator())
    torch.manual_seed(0)
    model = network(29, 8, 2, 7)
    trained, only = copy.deepcopy(model), copy.deepcopy(model)
    chains = torch.tensor([[0, 1, 2], [1, 3, 4]])
    train(trained, torch.optim.SGD(trained.parameters(), lr=0.1), toy, chains, name, 1)
    train(only, torch.optim.SGD(only.parameters(), lr=0.1), toy, chains[:0], "vft", 1)
    for a, b in zip(trained.parameters(), only.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_mean_is_over_all_questions_for_rrhf_too():
    toy = sums(AftConfig(sums_prompts=3), generator())
    torch.manual_seed(0)
    model = network(29, 8, 2, 7)
    every = torch.cartesian_prod(torch.tensor([0]), torch.arange(7), torch.arange(7))
    scored, right = chain_logp(model, toy, every[:, 0], every[:, 1:]), every[:, 2] == toy.gold_Q[0]
    worst_right, best_wrong = scored.masked_fill(~right, 0.0).argmin(), scored.masked_fill(right, -99.0).argmax()
    pair = every[[int(worst_right), int(best_wrong)]]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), toy, torch.cat([pair, torch.tensor([[1, 0, 0]])]), "rrhf", 1)
    again = network(29, 8, 2, 7)
    again.load_state_dict(dict(zip(again.state_dict(), before, strict=True)))
    s = chain_logp(again, toy, pair[:, 0], pair[:, 1:]) / 2
    assert float((s[1] - s[0]).detach()) > 0  # the hinge is active
    loss = (s[1] - s[0]) / 3 - chain_logp(again, toy, torch.arange(3), toy.reference_Q2).mean() / 2
    steps = torch.autograd.grad(loss, list(again.parameters()))
    for now, was, step in zip(model.parameters(), before, steps, strict=True):
        torch.testing.assert_close(now.detach(), was - step)
