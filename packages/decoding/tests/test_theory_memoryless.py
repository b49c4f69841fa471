"""The memoryless model: cumulants, large deviations, and best-of-n at long lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fairlead.errors import InputError
from fairlead_decoding import theory

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # log-space code must not lean on silent NaN

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def test_the_aligned_letter_law_of_a_tenth_of_a_nat() -> None:
    alpha = theory.letter_alpha(P, Q, 0.1)
    phi = theory.mismatched_tilt(P, Q, alpha)
    assert alpha == pytest.approx(1.1866944, abs=6e-8)
    assert phi == pytest.approx([0.3167220, 0.3074653, 0.3758127], abs=6e-8)
    assert phi @ np.log(Q) == pytest.approx(-1.1404178, abs=6e-8)
    assert P @ np.log(Q) == pytest.approx(-1.3045402, abs=6e-8)


def test_the_tilt_of_a_sequence_is_the_product_of_the_letters_tilts() -> None:
    words = np.array(list(itertools.product(range(3), repeat=4)))
    log_p, r = np.log(P)[words].sum(-1), np.log(Q)[words].sum(-1)
    alpha = theory.letter_alpha(P, Q, 0.1)
    letters = np.log(theory.mismatched_tilt(P, Q, alpha))
    assert theory.tilt(log_p, r, alpha) == pytest.approx(letters[words].sum(-1), abs=1e-12)
    assert float(theory.kl_divergence(theory.tilt(log_p, r, alpha), log_p)) == pytest.approx(0.4, rel=1e-10)


def test_cumulants_are_renyi_cross_entropies() -> None:
    assert theory.scaled_cumulant(P, Q, 2) == pytest.approx(-2.3330443, abs=6e-8)
    for t in (-3.0, -0.5, 1e-9, 1e-4, 2.0):
        assert theory.scaled_cumulant(P, Q, t) == pytest.approx(-t * theory.renyi_cross_entropy(P, Q, 1 + t), rel=1e-9)
    assert theory.renyi_cross_entropy(P, Q, 1.0) == pytest.approx(-(P @ np.log(Q)))
    grid = theory.renyi_cross_entropy(P, Q, 1 + np.array([-1e-4, -1e-7, 0.0, 1e-7, 1e-4]))
    assert (np.diff(grid) < 0).all()


def test_cumulants_of_the_aligned_model_are_those_of_its_letters() -> None:
    alpha = 0.8
    phi = theory.mismatched_tilt(P, Q, alpha)
    for t in (-1.0, 0.3, 2.0):
        assert theory.scaled_cumulant(P, Q, t, alpha) == pytest.approx(np.log(phi @ Q**t), rel=1e-12)


def test_the_rate_function_by_both_formulas() -> None:
    alpha = theory.letter_alpha(P, Q, 0.1)
    assert theory.rate_function(P, Q, alpha, -1.0) == pytest.approx(0.0685982, abs=6e-8)
    assert theory.alpha_for_reward(np.log(P), np.log(Q), -1.0) == pytest.approx(2.1813544, abs=6e-8)
    for theta in (-1.5, -1.3, -1.0, -0.8):
        best = minimize_scalar(lambda t, theta=theta: -(t * theta - theory.scaled_cumulant(P, Q, t, alpha)), options={"xtol": 1e-10})
        assert theory.rate_function(P, Q, alpha, theta) == pytest.approx(-best.fun, abs=1e-9)


def test_the_rate_function_at_its_minimum_its_ends_and_beyond() -> None:
    alpha = 0.7
    phi = theory.mismatched_tilt(P, Q, alpha)
    low, high = np.log(0.2), np.log(0.5)
    found = theory.rate_function(P, Q, alpha, [phi @ np.log(Q), low, high, low - 1e-9, 0.0])
    assert found[0] == pytest.approx(0, abs=1e-14)
    assert found[1:3] == pytest.approx([-np.log(phi[0]), -np.log(phi[2])])
    assert (found[3:] == np.inf).all()


def test_the_rate_function_predicts_the_tail_of_long_answers() -> None:
    alpha, theta = theory.letter_alpha(P, Q, 0.1), -1.0
    rates = []
    for m in (40, 80, 160):
        log_mass, reward = theory.types(P, Q, m)
        phi = theory.tilt(log_mass, reward, alpha)
        rates.append(-np.log(np.exp(phi)[reward / m >= theta].sum()) / m)
    target = theory.rate_function(P, Q, alpha, theta)
    assert rates[0] > rates[1] > rates[2] > target and rates[2] - target < 0.02


def test_letters_that_are_never_drawn_and_a_constant_reward_are_no_trouble() -> None:
    padded = theory.rate_function(np.append(P, 0.0), np.append(Q, 0.9), 0.5, -1.0)
    assert padded == pytest.approx(theory.rate_function(P, Q, 0.5, -1.0))
    assert theory.mismatched_tilt(np.append(P, 0.0), np.append(Q, 0.0), 2.0)[3] == 0.0
    constant = theory.rate_function(P, np.full(3, 0.25), 0.5, [np.log(0.25), -1.0])
    assert constant[0] == pytest.approx(0, abs=1e-15) and constant[1] == np.inf


def test_types_are_the_distribution_of_the_reward() -> None:
    words = np.array(list(itertools.product(range(3), repeat=5)))
    log_p, r = np.log(P)[words].sum(-1), np.log(Q)[words].sum(-1)
    log_mass, reward = theory.types(P, Q, 5)
    assert len(log_mass) == 21 and np.exp(log_mass).sum() == pytest.approx(1, abs=1e-12)
    for n in (4, 7.5):
        assert float(theory.bon_expected_reward(log_mass, reward, n)) == pytest.approx(float(theory.bon_expected_reward(log_p, np.round(r, 9), n)), abs=1e-8)
        assert float(theory.bon_kl_exact(log_mass, reward, n)) == pytest.approx(float(theory.bon_kl_exact(log_p, np.round(r, 9), n)), abs=1e-9)


def test_best_of_n_approaches_the_tilt_as_answers_grow() -> None:
    found = [theory.best_of_n_at_length(P, Q, m, 0.1) for m in (5, 10, 20, 40, 80, 160)]
    gaps, divergences = [x.gap for x in found], [x.kl_bon_tilt for x in found]
    assert gaps == pytest.approx([0.09918, 0.07626, 0.05260, 0.03277, 0.01942, 0.01132], abs=6e-6)
    assert divergences == pytest.approx([0.03857, 0.02717, 0.01915, 0.01433, 0.01054, 0.00718], abs=6e-6)
    assert (np.diff(gaps) < 0).all() and (np.diff(divergences) < 0).all()
    assert gaps[-1] < 0.0125 and divergences[-1] < 0.008


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.rate_function(P, [0.2, 0.0, 0.8], 0.5, -1.0), "q: must be above 0 where p is; letter 1"),
        (lambda: theory.cumulant([0.5, 0.4], [0.5, 0.5], 1.0), "sum 0.9"),
        (lambda: theory.cumulant(P, Q[:2], 1.0), "equally long"),
        (lambda: theory.types(P, Q, 0), "m=0"),
        (lambda: theory.types(P, Q, 10_000), "types"),
        (lambda: theory.best_of_n_at_length(P, Q, 10, 0.0), "m delta"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
