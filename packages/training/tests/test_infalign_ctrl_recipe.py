"""The recipe infalign-ctrl at smoke size, its exact win rates and its two losses by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fairlead.generation import generate
from fairlead.rewards import CalibrationTable
from fairlead.rewards.calibration import as_transform
from fairlead.runs import Run
from fairlead_training.recipes.infalign_ctrl import (
    InfAlignCtrl,
    InfAlignCtrlConfig,
    answer_logprobs,
    exact_loss,
    rollout_loss,
    tiny_llama,
    win_rates,
)

LOG_P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
R = torch.tensor([-3.0, 0, 10, 11])
C = torch.tensor([0.2, 0.55, 0.8, 0.95], dtype=torch.float64)


def tilt(phi, kl):
    """log of p exp(phi / beta) / Z at `kl` nats, and beta."""
    low, high = 1e-4, 1e4
    for _ in range(200):
        beta = (low * high) ** 0.5
        log_q = (LOG_P + phi / beta).log_softmax(0)
        low, high = (beta, high) if float((log_q.exp() * (log_q - LOG_P)).sum()) > kl else (low, beta)
    return log_q, beta


def test_the_recipe_reports_every_transform_and_threshold_and_resumes(tmp_path):
    recipe = InfAlignCtrl(vocab=3, length=2, hidden=16, references=12, steps=3, warmup=1, sampled=True, models=2, rollouts=8)
    run = Run.open(tmp_path / "run", "infalign-ctrl", recipe.config.model_dump(), 0)
    recipe(run)
    run.finish()
    assert len(run.checks) == 3 + 4 and not run.passed  # three steps are too few for the thresholds
    assert (tmp_path / "run" / "report.html").exists()
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 4 + 2 * 3
    assert len(list((tmp_path / "run" / "references").iterdir())) == 2  # the transforms share a model's reference answers


def test_the_calibrated_reward_of_the_card_is_its_table():
    rewards = torch.tensor([-3.0] * 4 + [0.0] * 3 + [10.0] * 2 + [11.0])
    assert CalibrationTable.fit([0], [rewards])([0] * 4, R).tolist() == pytest.approx(C.tolist())


@pytest.mark.parametrize(
    ("transform", "place", "rate"),
    [("identity", 0, 0.709488), ("identity", 1, 0.719510), ("identity", 2, 0.748215), ("exp:10", 1, 0.763706), ("exp:10", 2, 0.606183),
     ("exp:-10", 1, 0.617926), ("exp:-10", 2, 0.819799), ("log", 0, 0.705001), ("log", 1, 0.691320), ("log", 2, 0.785918)],
)  # fmt: skip
def test_win_rates_of_exact_tilts_are_the_known_ones(transform, place, rate):
    log_q, beta = tilt(torch.from_numpy(as_transform(transform)(C.numpy())), 0.3)
    assert win_rates(log_q, LOG_P, R)[place] == pytest.approx(rate, abs=2e-6)
    if transform == "identity":
        assert beta == pytest.approx(0.331694, abs=1e-6)
        assert log_q.exp().tolist() == pytest.approx([0.116216, 0.250374, 0.354673, 0.278738], abs=1e-6)


def test_win_rates_against_all_groups_of_three_with_ties_by_hand():
    q, p, r = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64), LOG_P.exp(), torch.tensor([0.0, 1, 1, 2])
    groups = torch.cartesian_prod(*[torch.arange(4)] * 3)
    for place, pick in ((1, torch.amax), (2, torch.amin)):
        value = pick(r[groups], 1)
        wins = (value[:, None] > value).double() + 0.5 * (value[:, None] == value)
        expected = q[groups].prod(1) @ wins @ p[groups].prod(1)
        assert win_rates(q.log(), p.log(), r, 3)[place] == pytest.approx(float(expected), abs=1e-12)


def test_the_reference_wins_half_and_one_answer_is_the_same_however_it_is_served():
    assert win_rates(LOG_P, LOG_P, R) == pytest.approx([0.5] * 3)
    log_q, _ = tilt(C, 0.3)
    assert win_rates(log_q, LOG_P, R, 1) == pytest.approx([0.709488] * 3, abs=2e-6)


def test_the_roll_out_gradient_is_the_exact_one_on_average():
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    q = logits.detach().softmax(0)
    loss, kl = exact_loss(logits.log_softmax(0), LOG_P, C, 0.2)
    (exact,) = torch.autograd.grad(loss, logits)
    mean, told = torch.zeros(4, dtype=torch.float64), 0.0
    for pair in torch.cartesian_prod(torch.arange(4), torch.arange(4)):
        sampled, estimate = rollout_loss(logits.log_softmax(0), LOG_P, C, 0.2, pair)
        chance = float(q[pair].prod())
        mean += chance * torch.autograd.grad(sampled, logits)[0]
        told += chance * estimate
    torch.testing.assert_close(mean, exact, atol=1e-12, rtol=1e-9)
    assert told == pytest.approx(kl, abs=1e-12)


def test_the_exact_loss_is_least_at_the_tilt():
    log_q, beta = tilt(C, 0.3)
    logits = log_q.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact_loss(logits.log_softmax(0), LOG_P, C, beta)[0], logits)
    assert float(gradient.abs().max()) < 1e-9


def test_answers_are_listed_with_their_probabilities_as_the_model_draws_them():
    config = InfAlignCtrlConfig(vocab=3, length=2, hidden=16, head_scale=20)
    model = tiny_llama(config, 0)
    answers = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    p = answer_logprobs(model, answers).exp().detach()
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    rows = torch.cat([torch.full((9, 1), 3), answers], 1)
    direct = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1).gather(-1, answers[..., None]).sum((1, 2)).exp()
    torch.testing.assert_close(p, direct.detach(), atol=1e-6, rtol=1e-5)
    drawn = torch.stack([g.ids for g in generate(model, None, [torch.tensor([3])], n=4000, max_new_tokens=2, batch_size=4000)[0]])
    counts = np.bincount((drawn * torch.tensor([3, 1])).sum(1), minlength=9) / 4000
    assert np.abs(counts - p.numpy()).max() < 4 * np.sqrt(0.25 / 4000)


def test_beta_that_is_not_controlled_stays(tmp_path):
    from fairlead_training.recipes.infalign_ctrl import train

    config = InfAlignCtrlConfig(vocab=3, length=2, hidden=16, references=12, steps=4, warmup=1)
    run = SimpleNamespace(dir=tmp_path, progress=lambda *_: None)
    fixed, moved = (train(config, 0, "identity", run, controlled=c)["path"] for c in (False, True))
    assert {beta for _, beta in fixed} == {moved[0][1]} and moved[3][1] < moved[0][1]
