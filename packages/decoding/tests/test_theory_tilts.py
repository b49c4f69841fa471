"""The tilted distribution: the optimum for a budget of KL divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairlead.errors import InputError
from fairlead_decoding import theory

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # log-space code must not lean on silent NaN

P, R = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, 3.0])
LOG_P = np.log(P)


@pytest.mark.parametrize(
    ("kl", "alpha"), [(0.05, 0.301888), (0.2, 0.594641), (0.5, 0.961602), (1.0, 1.494874), (2.0, 3.399944)]
)
def test_alpha_spends_the_budget(kl: float, alpha: float) -> None:
    found = theory.solve_alpha(LOG_P, R, kl)
    assert found == pytest.approx(alpha, abs=6e-7)
    assert float(theory.kl_divergence(theory.tilt(LOG_P, R, found), LOG_P)) == pytest.approx(kl, rel=1e-11)


def test_the_optimum_of_half_a_nat() -> None:
    phi = theory.tilt(LOG_P, R, theory.solve_alpha(LOG_P, R, 0.5))
    assert np.exp(phi) == pytest.approx([0.092095, 0.180682, 0.315096, 0.412127], abs=6e-7)
    assert float(theory.expected(phi, R)) == pytest.approx(2.047255, abs=6e-7)


def test_beyond_the_largest_budget_the_best_outcomes_are_left() -> None:
    ties = np.array([0.0, 3.0, 1.0, 3.0])
    assert float(theory.kl_max(LOG_P, R)) == pytest.approx(np.log(10))
    assert float(theory.kl_max(LOG_P, ties)) == pytest.approx(-np.log(0.4))
    for kl in (np.log(10), np.nextafter(np.log(10), 0), 2.31, 50.0):
        assert np.exp(theory.tilt(LOG_P, R, theory.solve_alpha(LOG_P, R, kl))) == pytest.approx([0, 0, 0, 1], abs=1e-6)
    alpha = theory.solve_alpha(LOG_P, ties, 1.0)
    assert alpha == np.inf
    assert np.exp(theory.tilt(LOG_P, ties, alpha)) == pytest.approx([0, 0.75, 0, 0.25])


def test_alpha_of_no_budget_is_zero_and_of_a_constant_reward_infinite() -> None:
    assert theory.solve_alpha(LOG_P, R, 0.0) == 0.0
    assert theory.solve_alpha(LOG_P, np.ones(4), 0.0) == 0.0
    assert theory.solve_alpha(LOG_P, np.ones(4), 0.1) == np.inf
    assert theory.tilt(LOG_P, np.ones(4), np.inf) == pytest.approx(LOG_P)


def test_tilts_of_zero_and_of_negative_and_infinite_alpha() -> None:
    assert theory.tilt(LOG_P, R, 0.0) == pytest.approx(LOG_P)
    assert theory.tilt(LOG_P, R, -0.7) == pytest.approx(theory.tilt(LOG_P, -R, 0.7))
    assert np.exp(theory.tilt(LOG_P, R, -np.inf)) == pytest.approx([1, 0, 0, 0])
    assert np.exp(theory.tilt(LOG_P, R, 1e300)) == pytest.approx([0, 0, 0, 1])
    assert np.exp(theory.tilt(LOG_P, R * 1e200, 1e200)) == pytest.approx([0, 0, 0, 1])


def test_an_outcome_that_is_never_drawn_changes_nothing() -> None:
    log_p, r = np.append(LOG_P, -np.inf), np.append(R, 1e9)
    assert theory.solve_alpha(log_p, r, 0.5) == pytest.approx(theory.solve_alpha(LOG_P, R, 0.5), rel=1e-12)
    assert float(theory.kl_max(log_p, r)) == pytest.approx(np.log(10))
    for alpha in (-np.inf, -2.0, 0.0, 3.0, np.inf):
        found = theory.tilt(log_p, r, alpha)
        assert found[4] == -np.inf
        assert np.exp(found[:4]) == pytest.approx(np.exp(theory.tilt(LOG_P, R, alpha)))


@pytest.mark.parametrize("kl", [1e-18, 1e-9, 1e-3, 2.3, 2.302585])
def test_tiny_and_nearly_exhausted_budgets_are_solved(kl: float) -> None:
    alpha = theory.solve_alpha(LOG_P, R, kl)
    small = np.sqrt(2 * kl / float(theory.variance(LOG_P, R)))
    if kl < 1e-8:
        assert alpha == pytest.approx(small, rel=1e-4)
    else:
        assert float(theory.kl_divergence(theory.tilt(LOG_P, R, alpha), LOG_P)) == pytest.approx(kl, rel=1e-9)


def test_alpha_scales_against_the_reward() -> None:
    for c in (1e-9, 1e-3, 7.0, 1e12):
        assert theory.solve_alpha(LOG_P, c * R, 0.5) * c == pytest.approx(theory.solve_alpha(LOG_P, R, 0.5), rel=1e-10)


def test_the_divergence_grows_with_alpha_at_the_rate_alpha_times_variance() -> None:
    for alpha in (0.2, 1.0, 4.0):
        step = 1e-6
        up, down = (float(theory.kl_divergence(theory.tilt(LOG_P, R, alpha + s), LOG_P)) for s in (step, -step))
        assert (up - down) / (2 * step) == pytest.approx(alpha * float(theory.variance(theory.tilt(LOG_P, R, alpha), R)), rel=1e-6)


def test_three_point_identity_holds_for_every_policy() -> None:
    rng = np.random.default_rng(0)
    log_pi = np.log(rng.dirichlet(np.ones(4), size=20))
    log_p = np.log(rng.dirichlet(np.ones(4), size=20))
    r, alpha = rng.normal(size=(20, 4)), rng.normal(scale=3, size=20)
    direct = theory.kl_divergence(log_pi, theory.tilt(log_p, r, alpha))
    by_identity = theory.kl_to_tilt(log_p, r, alpha, theory.kl_divergence(log_pi, log_p), theory.expected(log_pi, r))
    assert np.abs(direct - by_identity).max() < 1e-12


def test_no_policy_of_the_same_divergence_earns_more() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        log_pi = np.log(rng.dirichlet(np.ones(4)))
        alpha = theory.solve_alpha(LOG_P, R, float(theory.kl_divergence(log_pi, LOG_P)))
        assert float(theory.expected(log_pi, R)) <= float(theory.expected(theory.tilt(LOG_P, R, alpha), R)) + 1e-12


def test_derivatives_of_the_log_partition_are_mean_and_variance() -> None:
    alpha = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    log_z = (torch.tensor(LOG_P) + alpha * torch.tensor(R)).logsumexp(-1)
    (mean,) = torch.autograd.grad(log_z, alpha, create_graph=True)
    (spread,) = torch.autograd.grad(mean, alpha)
    phi = theory.tilt(LOG_P, R, 0.8)
    assert float(theory.log_partition(LOG_P, R, 0.8)) == pytest.approx(float(log_z.detach()))
    assert float(theory.expected(phi, R)) == pytest.approx(float(mean.detach()), rel=1e-12)
    assert float(theory.variance(phi, R)) == pytest.approx(float(spread), rel=1e-12)


def test_one_shared_alpha_spends_the_budget_on_average() -> None:
    rng = np.random.default_rng(2)
    log_p, r = np.log(rng.dirichlet(np.ones(6), size=5)), rng.normal(size=(5, 6))
    shared = theory.solve_alpha(log_p, r, 0.3)
    spent = theory.kl_divergence(theory.tilt(log_p, r, shared), log_p)
    assert float(spent.mean()) == pytest.approx(0.3, rel=1e-10) and float(np.ptp(spent)) > 0.01
    alone = theory.solve_alpha(log_p, r, 0.3, shared=False)
    assert theory.kl_divergence(theory.tilt(log_p, r, alone), log_p) == pytest.approx(np.full(5, 0.3), rel=1e-10)
    assert alone[3] == pytest.approx(theory.solve_alpha(log_p[3], r[3], 0.3), rel=1e-11)
    earned = [float(theory.expected(theory.tilt(log_p, r, a), r).mean()) for a in (shared, alone)]
    assert earned[0] > earned[1]


def test_rows_of_a_batch_may_have_budgets_of_their_own_and_be_padded() -> None:
    log_p = np.array([[*LOG_P, -np.inf], [np.log(0.2)] * 5])
    r = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    found = theory.solve_alpha(log_p, r, np.array([0.5, 5.0]), shared=False)
    assert found[0] == pytest.approx(0.961602, abs=6e-7) and found[1] == np.inf


def test_the_alpha_of_a_wanted_reward_is_found_on_either_side() -> None:
    for alpha in (-3.0, -1e-6, 0.0, 0.4, 20.0):
        reward = float(theory.expected(theory.tilt(LOG_P, R, alpha), R))
        assert theory.alpha_for_reward(LOG_P, R, reward) == pytest.approx(alpha, rel=1e-6, abs=1e-12)
    assert theory.alpha_for_reward(LOG_P, R, 3.0) == np.inf and theory.alpha_for_reward(LOG_P, R, 0.0) == -np.inf
    with pytest.raises(InputError, match="between 0 and 3"):
        theory.alpha_for_reward(LOG_P, R, 3.1)


def test_torch_tensors_are_taken_and_numpy_given() -> None:
    log_p = torch.tensor(LOG_P, requires_grad=True)
    found = theory.tilt(log_p, torch.tensor(R).float(), 1.0)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    assert found == pytest.approx(theory.tilt(LOG_P, R, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.tilt(np.log([0.5, 0.4]), [0, 1], 1.0), "sum to 1"),
        (lambda: theory.tilt([np.log([0.5, 0.5]), np.log([0.5, 0.4])], [0, 1], 1.0), "row 1"),
        (lambda: theory.tilt([0.5, np.nan], [0, 1], 1.0), "log_p: entry 1 is NaN"),
        (lambda: theory.tilt(LOG_P, [0, 1, np.inf, 2], 1.0), "r: entry 2 is inf"),
        (lambda: theory.tilt(LOG_P, [[0, 1, 2, np.nan]], 1.0), r"r: entry \(0, 3\) is NaN"),
        (lambda: theory.tilt(LOG_P, [0, 1], 1.0), r"shape of log_p, \[4\]"),
        (lambda: theory.tilt([], [], 1.0), "M >= 1"),
        (lambda: theory.tilt(LOG_P, R, np.nan), "alpha"),
        (lambda: theory.tilt(LOG_P, R, [1.0, 2.0]), "one per row"),
        (lambda: theory.solve_alpha(LOG_P, R, -0.1), "at least 0 nats, got -0.1"),
        (lambda: theory.solve_alpha(LOG_P, R, [0.1, 0.2]), "shared=False"),
        (lambda: theory.kl_divergence(LOG_P, np.log([0.5, 0.5])), "4 outcomes"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
