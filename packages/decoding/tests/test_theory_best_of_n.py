"""Best-of-n: exact distribution, divergence, win rate, and what can be estimated from draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from fairlead.errors import InputError
from fairlead_decoding import theory

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # log-space code must not lean on silent NaN

P, R = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, 3.0])
LOG_P = np.log(P)
TIES = np.array([0.0, 1.0, 1.0, 1.0])


def test_the_distribution_without_ties() -> None:
    pi = theory.bon_log_pmf(LOG_P, R, 4)
    assert np.exp(pi) == pytest.approx([0.0256, 0.2145, 0.4160, 0.3439], abs=1e-12)
    assert float(theory.bon_kl_exact(LOG_P, R, 4)) == pytest.approx(0.5871137, abs=6e-8)
    assert theory.bon_kl_bound(4) == pytest.approx(0.6362944, abs=6e-8)
    assert float(np.exp(pi) @ theory.bon_kl_estimate(LOG_P, 4)) == pytest.approx(0.6220551, abs=6e-8)
    assert float(theory.bon_win_rate(LOG_P, R, 4)) == pytest.approx(0.7826, abs=1e-12)


def test_one_draw_is_the_model_itself() -> None:
    assert theory.bon_log_pmf(LOG_P, R, 1) == pytest.approx(LOG_P, abs=1e-14)
    assert float(theory.bon_kl_exact(LOG_P, R, 1)) == pytest.approx(0, abs=1e-14)
    assert float(theory.bon_win_rate(LOG_P, R, 1)) == pytest.approx(0.5)
    assert theory.bon_kl_bound(1) == 0.0
    assert theory.bon_kl_estimate(LOG_P, 1) == pytest.approx(np.zeros(4), abs=1e-14)


def test_the_formula_of_the_literature_exceeds_what_a_finite_model_can_diverge() -> None:
    exact, bound = float(theory.bon_kl_exact(LOG_P, R, 64)), theory.bon_kl_bound(64)
    assert exact == pytest.approx(2.2926393, abs=6e-8) and bound == pytest.approx(3.1745081, abs=6e-8)
    assert exact < -np.log(0.1) < bound


def test_ties_share_what_their_group_wins() -> None:
    assert np.exp(theory.bon_log_pmf(LOG_P, TIES, 4)) == pytest.approx([0.0256, 0.4872, 0.3248, 0.1624], abs=1e-12)
    assert float(theory.bon_kl_exact(LOG_P, TIES, 4)) == pytest.approx(0.4021079, abs=6e-8)
    assert float(theory.bon_win_rate(LOG_P, TIES, 4)) == pytest.approx(0.6872, abs=1e-12)


@pytest.mark.parametrize(
    ("outcomes", "kl", "win"), [(2, 0.4593555, 0.71875), (10, 0.6288251, 0.79667), (100, 0.6362194, 0.7999667)]
)
def test_finer_models_approach_the_bounds_from_below(outcomes: int, kl: float, win: float) -> None:
    log_p, r = np.full(outcomes, -np.log(outcomes)), np.arange(outcomes)
    assert float(theory.bon_kl_exact(log_p, r, 4)) == pytest.approx(kl, abs=6e-8)
    assert float(theory.bon_win_rate(log_p, r, 4)) == pytest.approx(win, abs=6e-6)
    assert float(theory.bon_kl_exact(log_p, r, 4)) < theory.bon_kl_bound(4)
    assert float(theory.bon_win_rate(log_p, r, 4)) < theory.bon_win_rate_bound(4)


def test_reference_values_of_the_bounds() -> None:
    assert theory.bon_kl_bound([2, 4, 8, 16, 64, 1000]) == pytest.approx([0.1931, 0.6363, 1.2044, 1.8351, 3.1745, 5.9088], abs=6e-5)
    assert theory.bon_win_rate_bound([2, 4, 8, 16, 64, 1000]) == pytest.approx([0.6667, 0.8, 0.8889, 0.9412, 0.9846, 0.9990], abs=6e-5)
    assert theory.bon_kl_bound(4, blocks=3) == pytest.approx(3 * theory.bon_kl_bound(4))


def test_best_of_n_lies_under_the_frontier_by_its_divergence_from_the_tilt() -> None:
    kl = float(theory.bon_kl_exact(LOG_P, R, 4))
    alpha = theory.solve_alpha(LOG_P, R, kl)
    phi = theory.tilt(LOG_P, R, alpha)
    best, reward = float(theory.expected(phi, R)), float(theory.bon_expected_reward(LOG_P, R, 4))
    assert alpha == pytest.approx(1.0547276, abs=6e-8)
    assert (reward, best) == pytest.approx((2.0782, 2.1337076), abs=6e-8)
    apart = float(theory.kl_divergence(theory.bon_log_pmf(LOG_P, R, 4), phi))
    assert apart == pytest.approx(0.0585454, abs=6e-8) and apart == pytest.approx(alpha * (best - reward), abs=1e-9)


def test_n_need_not_be_whole() -> None:
    count = 100_000
    log_p = np.full(count, -np.log(count))
    assert float(theory.bon_kl_exact(log_p, np.arange(count), 2.5)) == pytest.approx(np.log(2.5) - 1.5 / 2.5, abs=1e-4)


def test_expected_rank_win_rate_and_their_bound_are_in_order() -> None:
    for r in (R, TIES):
        rank, win = float(theory.bon_expected_rank(LOG_P, r, 4)), float(theory.bon_win_rate(LOG_P, r, 4))
        assert rank > 4 / 5 > win


def test_worst_of_n_is_best_of_n_of_the_negated_reward() -> None:
    assert theory.bon_log_pmf(LOG_P, R, 3, worst=True) == pytest.approx(theory.bon_log_pmf(LOG_P, -R, 3))
    assert float(theory.bon_win_rate(LOG_P, R, 3, worst=True)) == pytest.approx(1 - float(theory.bon_win_rate(LOG_P, -R, 3)))


def test_best_of_n_ignores_any_increasing_map_of_the_reward() -> None:
    assert theory.bon_log_pmf(LOG_P, np.exp(5 * R), 7) == pytest.approx(theory.bon_log_pmf(LOG_P, R, 7), abs=1e-13)


def test_a_batch_is_its_rows_and_padding_is_never_drawn() -> None:
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.ones(7), size=3))
    log_p[1] = np.append(LOG_P, [-np.inf] * 3)
    r = rng.integers(0, 4, size=(3, 7)).astype(float)
    r[1] = np.append(R, [-9.0, 1.0, 99.0])
    found = theory.bon_log_pmf(log_p, r, 4)
    for row in range(3):
        assert found[row] == pytest.approx(theory.bon_log_pmf(log_p[row], r[row], 4), nan_ok=False)
    assert found[1, :4] == pytest.approx(theory.bon_log_pmf(LOG_P, R, 4))
    assert (found[1, 4:] == -np.inf).all()
    assert float(theory.bon_expected_reward(log_p, r, 4)[1]) == pytest.approx(2.0782)


def test_tiny_probabilities_and_huge_n_lose_nothing() -> None:
    # a top outcome of probability e: pi_n(top) = 1 - (1 - e)^n whatever e and n
    for e, n in ((1e-300, 4.0), (1e-18, 1e9), (1e-12, 1e12), (1e-3, 1e12)):
        log_p = np.array([np.log1p(-e), np.log(e)])
        found = theory.bon_log_pmf(log_p, [0.0, 1.0], n)
        assert np.exp(found[1]) == pytest.approx(-np.expm1(n * np.log1p(-e)), rel=1e-9)
        assert found[0] == pytest.approx(n * np.log1p(-e), rel=1e-9)
    deep = np.array([0.0, -800.0])
    assert theory.bon_log_pmf(deep, [0.0, 1.0], 4)[1] == pytest.approx(-800 + np.log(4), abs=1e-9)
    for n in (1e6, 1e9, 1e15):
        assert np.exp(theory.bon_log_pmf(LOG_P, R, n)).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_any_model_and_reward_obey_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    p = rng.dirichlet(np.full(count, 10.0 ** rng.uniform(-2, 1)))
    p[rng.random(count) < 0.2] = 0
    p = p / p.sum() if p.sum() > 0 else np.full(count, 1 / count)
    r = rng.integers(0, 8, count) / 3 if seed % 2 else rng.normal(size=count)
    n = float(rng.choice([1.0, 1.7, 2.0, 16.0, 1000.0]))
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    pi, kl = np.exp(theory.bon_log_pmf(log_p, r, n)), float(theory.bon_kl_exact(log_p, r, n))
    assert pi.sum() == pytest.approx(1, abs=1e-12) and (pi[p == 0] == 0).all()
    upto, below = ((r[:, None] >= r) @ p).clip(0, 1), ((r[:, None] > r) @ p).clip(0, 1)
    drawn = p > 0
    naive = p[drawn] / ((r[:, None] == r) @ p)[drawn] * (upto**n - below**n)[drawn]
    assert pi[drawn] == pytest.approx(naive, rel=1e-6, abs=1e-12)
    assert kl <= min(theory.bon_kl_bound(n), float(theory.kl_max(log_p, r))) + 1e-12
    assert float(theory.bon_win_rate(log_p, r, n)) <= n / (n + 1) + 1e-12
    alpha = theory.solve_alpha(log_p, r, kl)
    assert float(theory.bon_expected_reward(log_p, r, n)) <= float(theory.expected(theory.tilt(log_p, r, alpha), r)) + 1e-9


def test_the_estimate_at_its_ends() -> None:
    assert theory.bon_kl_estimate(-800.0, 16) == pytest.approx(theory.bon_kl_bound(16), abs=1e-12)
    assert theory.bon_kl_estimate(-np.inf, 16) == pytest.approx(theory.bon_kl_bound(16), abs=1e-12)
    assert theory.bon_kl_estimate(np.log(1e-12), 16) == pytest.approx(theory.bon_kl_bound(16), abs=1e-9)
    assert theory.bon_kl_estimate(0.0, 16) == 0.0
    grid = theory.bon_kl_estimate(np.linspace(-40, 0, 400), 16)
    assert (np.diff(grid) <= 1e-12).all() and (grid >= 0).all()


@pytest.mark.parametrize("e", [0.01, 0.3, 0.9])
def test_the_estimate_is_exact_for_one_atom_above_a_continuum(e: float) -> None:
    rest = 100_000
    log_p = np.append(np.full(rest, np.log((1 - e) / rest)), np.log(e))
    assert theory.bon_kl_estimate(np.log(e), 8) == pytest.approx(float(theory.bon_kl_exact(log_p, np.arange(rest + 1), 8)), abs=1e-4)


def test_n_for_a_budget_inverts_the_bound() -> None:
    assert theory.n_for_kl(0) == 1.0
    budgets = np.array([1e-14, 1e-6, 1e-3, 0.19314718, 1.0, 5.9088, 50.0])
    found = theory.n_for_kl(budgets)
    assert theory.bon_kl_bound(found[1:]) == pytest.approx(budgets[1:], rel=1e-6)
    assert np.log(found[0]) == pytest.approx(np.sqrt(2e-14), rel=1e-6)
    assert theory.n_for_kl(theory.bon_kl_bound(16)) == pytest.approx(16, rel=1e-12)
    from scipy.special import lambertw

    assert found[3:] == pytest.approx(-1 / lambertw(-np.exp(-1 - budgets[3:])).real, rel=1e-9)


def test_best_of_n_from_draws_is_the_mean_over_all_subsets() -> None:
    draws = np.arange(10.0)[np.random.default_rng(0).permutation(10)]
    brute = np.mean([max(c) for c in itertools.combinations(draws, 3)])
    assert theory.best_of_n_reward(draws, 3) == pytest.approx(brute) == pytest.approx(7.25)
    assert theory.best_of_n_reward(draws, 1) == pytest.approx(4.5)
    assert theory.best_of_n_reward(draws, 10) == pytest.approx(9.0)
    ties = np.array([1.0, 1.0, 2.0, 2.0, 0.0])
    assert theory.best_of_n_reward(ties, 2) == pytest.approx(np.mean([max(c) for c in itertools.combinations(ties, 2)]))


def test_every_n_comes_from_the_same_draws_of_every_prompt() -> None:
    rewards = np.random.default_rng(1).normal(size=(3, 400))
    found = theory.best_of_n_reward(rewards, [1, 2, 400])
    assert found.shape == (3, 3)
    assert found[:, 0] == pytest.approx(rewards.mean(-1)) and found[:, 2] == pytest.approx(rewards.max(-1))
    assert theory.best_of_n_reward(rewards, 2) == pytest.approx(found[:, 1])
    assert theory.order_weights(100_000, 300).sum() == pytest.approx(1)


def test_the_interval_covers_the_exact_reward_about_as_often_as_it_says() -> None:
    rng, exact, hits = np.random.default_rng(3), float(theory.bon_expected_reward(LOG_P, R, 4)), 0
    for trial in range(100):
        interval = theory.best_of_n_interval(rng.choice(R, 300, p=P), 4, level=0.9, resamples=200, seed=trial)
        hits += interval.low <= exact <= interval.high
    assert 80 <= hits <= 98
    prompts = theory.best_of_n_interval(rng.choice(R, (50, 20), p=P), 4)
    assert prompts.n == 50 and prompts.low < prompts.estimate < prompts.high


def test_sampled_best_of_four_follows_the_exact_distribution() -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice(4, size=(200_000, 4), p=P)
    for r in (R, TIES):
        scores = r[draws] + rng.random(draws.shape) * 1e-6  # noise far below the gaps breaks ties at random
        counts = np.bincount(draws[np.arange(len(draws)), scores.argmax(-1)], minlength=4)
        assert chisquare(counts, len(draws) * np.exp(theory.bon_log_pmf(LOG_P, r, 4))).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.bon_log_pmf(LOG_P, R, 0.5), "n: must be a finite number of at least 1, got 0.5"),
        (lambda: theory.bon_log_pmf(LOG_P, R, np.inf), "finite"),
        (lambda: theory.bon_log_pmf(LOG_P, [0, np.nan, 1, 2], 2), "entry 1"),
        (lambda: theory.bon_kl_bound(0), "at least 1"),
        (lambda: theory.bon_win_rate_bound(0.5), "at least 1"),
        (lambda: theory.bon_kl_estimate(0.5, 4), "at most 0, got 0.5"),
        (lambda: theory.n_for_kl(-1), "at least 0 nats, got -1"),
        (lambda: theory.best_of_n_reward([1.0, 2.0], 3), "between 1 and the 2 draws, got 3"),
        (lambda: theory.best_of_n_reward([1.0, np.nan], 1), "entry 1 is NaN"),
        (lambda: theory.best_of_n_reward(np.zeros((2, 2, 2)), 1), r"\[P, K\]"),
        (lambda: theory.best_of_n_replicates(np.zeros((2, 2)), 1), "one prompt"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
