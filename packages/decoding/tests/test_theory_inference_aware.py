"""Win rates after best-of-n and worst-of-n: closed form, exact on listed outcomes, and from draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fairlead.errors import InputError, UnknownNameError
from fairlead_decoding import theory
from fairlead_decoding.theory import BestOfN, Identity, Transform, WorstOfN
from fairlead_decoding.theory.inference_aware import quantile_win_rate
from fairlead_decoding.theory.quadrature import rule
from fairlead_decoding.theory.transforms import gradient

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # log-space code must not lean on silent NaN

P, R = np.array([0.4, 0.3, 0.2, 0.1]), np.array([-3.0, 0.0, 10.0, 11.0])
LOG_P = np.log(P)
TABLE = [
    (Transform.identity(), 0.7737, 0.7998, 0.8860, 0.2428),
    (Transform.log(), 0.7682, 0.7682, 0.9270, 0.4321),
    (Transform.exp(5, normalised=False), 0.7461, 0.8566, 0.7465, 47.95),
    (Transform.exp(10, normalised=False), 0.7117, 0.8715, 0.6763, 7012),
    (Transform.exp(10), 0.7117, 0.8715, 0.6763, 0.3184),
    (Transform.exp(-5, normalised=False), 0.7539, 0.7230, 0.9439, 0.0703),
    (Transform.exp(-10, normalised=False), 0.7358, 0.6859, 0.9476, 0.01151),
    (Transform.optimal("best-of-n", 4, kl=0.5), 0.7025, 0.8733, 0.6646, 0.2166),
    (Transform.optimal("worst-of-n", 4, kl=0.5), 0.7344, 0.6803, 0.9479, 0.2084),
]


@pytest.mark.parametrize(("transform", "standard", "best", "worst", "beta"), TABLE, ids=lambda v: getattr(v, "name", None))
def test_the_frontier_at_half_a_nat(transform: Transform, standard: float, best: float, worst: float, beta: float) -> None:
    found = theory.frontier(transform, "best-of-n", 4, kl=0.5)
    assert found.kl == pytest.approx(0.5, abs=1e-9)
    assert (found.standard, found.win_rate, found.under("worst-of-n", 4)) == pytest.approx((standard, best, worst), abs=6e-5)
    assert found.beta == pytest.approx(beta, rel=3e-4)


def test_the_frontier_at_other_budgets() -> None:
    for kl, figures in ((0.25, (0.6989, 0.7304, 0.7847, 0.7966, 0.8563)), (1.0, (0.8646, 0.8770, 0.9745, 0.9351, 0.9927))):
        plain = theory.frontier("identity", kl=kl)
        found = (
            plain.standard, plain.under("best-of-n", 4), plain.under("worst-of-n", 4),
            theory.frontier("exp:10", "best-of-n", 4, kl=kl).win_rate, theory.frontier("exp:-10", "worst-of-n", 4, kl=kl).win_rate,
        )  # fmt: skip
        assert found == pytest.approx(figures, abs=6e-5)


def test_the_optimal_transforms_lead_in_their_own_columns() -> None:
    points = [theory.frontier(t, kl=0.5) for t, *_ in TABLE]
    best = [p.under("best-of-n", 4) for p in points]
    worst = [p.under("worst-of-n", 4) for p in points]
    assert int(np.argmax(best)) == 7 and int(np.argmax(worst)) == 8
    assert int(np.argmax([p.standard for p in points])) == 0


def test_identity_has_its_textbook_form() -> None:
    found = theory.frontier("identity", beta=0.5)
    assert (found.kl, found.standard) == pytest.approx((0.1515959, 0.6565177), abs=6e-8)
    for beta in (0.02, 0.3, 2.0):
        point = theory.frontier("identity", beta=beta)
        mean = 1 / (1 - np.exp(-1 / beta)) - beta
        assert point.standard == pytest.approx(mean, rel=1e-12)
        assert point.kl == pytest.approx(mean / beta - 1 / beta - np.log(beta * -np.expm1(-1 / beta)), rel=1e-9)


@pytest.mark.parametrize("n", [2, 4, 7.5, 16])
def test_log_gives_best_of_n_itself(n: float) -> None:
    found = theory.frontier("log", beta=1 / (n - 1))
    assert found.kl == pytest.approx(theory.bon_kl_bound(n), rel=1e-9)
    for count in (1, 2, 4, 9):
        assert found.under("best-of-n", count) == pytest.approx(n / (n + 1), rel=1e-9)
    if n == 4:
        assert (found.kl, found.standard) == pytest.approx((0.636294, 0.8), abs=6e-7)


def test_the_reference_model_wins_half_under_every_procedure() -> None:
    found = theory.frontier("identity", kl=0.0)
    assert found.beta == np.inf and found.kl == pytest.approx(0, abs=1e-12)
    for procedure in (Identity(), BestOfN(4), WorstOfN(4), BestOfN(32)):
        assert found.under(procedure) == pytest.approx(0.5, abs=1e-10)


def test_one_draw_makes_every_procedure_the_standard_win_rate() -> None:
    found = theory.frontier("exp:3", kl=0.7)
    assert found.under("best-of-n", 1) == pytest.approx(found.standard) == pytest.approx(found.under("worst-of-n", 1))


def test_the_exponential_becomes_the_identity_and_stays_finite() -> None:
    c = np.linspace(0, 1, 7)
    for t in (1e-12, -1e-12, 1e-6, -1e-6):
        assert Transform.exp(t)(c) == pytest.approx(c, abs=1e-6)
    for t in (600.0, -600.0, 10.0):
        values = Transform.exp(t)(c)
        assert values[0] == 0 and values[-1] == pytest.approx(1) and (np.diff(values) >= 0).all()
    assert Transform.exp(2.0)(c) == pytest.approx(np.expm1(2 * c) / np.expm1(2))
    assert Transform.power(3)(c) == pytest.approx(c**3)


@pytest.mark.parametrize("t", [10.0, -10.0])
def test_normalising_only_rescales_beta(t: float) -> None:
    raw, normalised = (theory.frontier(Transform.exp(t, normalised=v), kl=0.5) for v in (False, True))
    assert raw.beta / normalised.beta == pytest.approx(abs(np.expm1(t)), rel=1e-8)
    assert raw.standard == pytest.approx(normalised.standard, rel=1e-9)


@pytest.mark.parametrize("procedure", [Identity(), BestOfN(4), WorstOfN(4)], ids=lambda p: p.name)
def test_the_gradient_of_the_win_rate_is_the_optimal_transform(procedure: theory.Procedure) -> None:
    r, point = rule(), theory.frontier("exp:2", kl=0.4)
    phi = gradient(procedure, point.cdf)
    a, b = 0.8, 0.3

    def bump(at: float) -> np.ndarray:
        shape = np.exp(-(((r.u - at) / 0.003) ** 2) / 2)
        return shape / r.integral(shape)

    direction = bump(a) - bump(b)
    eps = 1e-5
    up, down = (quantile_win_rate(point.density + s * direction, procedure) for s in (eps, -eps))
    slope = (up - down) / (2 * eps)
    assert slope == pytest.approx(r.integral(direction * phi), abs=1e-8)
    # and, but for the bumps' width, the difference of the transform between the two quantiles
    assert slope == pytest.approx(float(np.interp(a, r.u, phi) - np.interp(b, r.u, phi)), abs=1e-4)


def test_calibration_is_the_mid_rank_whatever_the_scale() -> None:
    assert theory.calibrate(LOG_P, R) == pytest.approx([0.2, 0.55, 0.8, 0.95])
    assert theory.calibrate(LOG_P, np.tanh(R / 20)) == pytest.approx([0.2, 0.55, 0.8, 0.95])
    assert P @ theory.calibrate(LOG_P, R) == pytest.approx(0.5)
    ties = theory.calibrate(LOG_P, [0.0, 1.0, 1.0, 1.0])
    assert ties == pytest.approx([0.2, 0.7, 0.7, 0.7])
    assert P @ (ties - 0.5) ** 2 == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("transform", "standard", "best", "worst"),
    [
        ("identity", 0.709488, 0.719510, 0.748215), ("exp:10", None, 0.763706, 0.606183), ("exp:-10", None, 0.617926, 0.819799),
        ("log", 0.705001, 0.691320, 0.785918),
    ],
)  # fmt: skip
def test_exact_win_rates_of_tilts_on_four_outcomes(transform: str, standard: float | None, best: float, worst: float) -> None:
    phi = theory.as_transform(transform)(theory.calibrate(LOG_P, R))
    alpha = theory.solve_alpha(LOG_P, phi, 0.3)
    log_q = theory.tilt(LOG_P, phi, alpha)
    if standard is not None:
        assert float(theory.exact_win_rate(log_q, LOG_P, R)) == pytest.approx(standard, abs=6e-7)
    assert float(theory.exact_win_rate(log_q, LOG_P, R, "best-of-n", 4)) == pytest.approx(best, abs=6e-7)
    assert float(theory.exact_win_rate(log_q, LOG_P, R, WorstOfN(4))) == pytest.approx(worst, abs=6e-7)
    if transform == "identity":
        assert 1 / alpha == pytest.approx(0.331694, abs=6e-7)
        assert np.exp(log_q) == pytest.approx([0.116216, 0.250374, 0.354673, 0.278738], abs=6e-7)


def spent(transform: str, c: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    phi = theory.as_transform(transform)(c) if transform else c
    return theory.tilt(log_p, phi, theory.solve_alpha(log_p, phi, 0.5))


def test_closed_form_holds_for_any_model_and_any_reward_but_not_for_raw_rewards() -> None:
    rng, heavy_raw = np.random.default_rng(0), []
    for draw in range(5):
        log_p = np.log(rng.dirichlet(np.ones(4096)))
        for law in ("normal", "student"):
            r = rng.normal(size=4096) if law == "normal" else rng.standard_t(2, size=4096)
            exact = theory.calibrate(log_p, r)
            for name in ("identity", "exp:10", "exp:-10"):
                point, log_q = theory.frontier(name, kl=0.5), spent(name, exact, log_p)
                for procedure in (Identity(), BestOfN(4), WorstOfN(4)):
                    assert float(theory.exact_win_rate(log_q, log_p, r, procedure)) == pytest.approx(point.under(procedure), abs=1e-3), draw
            estimate = theory.calibrate_from_samples(r, r[rng.choice(4096, 100, p=np.exp(log_p))])
            for name, procedure, figure, slack in (
                ("identity", BestOfN(4), 0.794, 0.03), ("exp:10", BestOfN(4), 0.868, 0.012), ("exp:-10", WorstOfN(4), 0.947, 0.005),
            ):  # fmt: skip
                assert float(theory.exact_win_rate(spent(name, estimate, log_p), log_p, r, procedure)) == pytest.approx(figure, abs=slack)
            raw = float(theory.exact_win_rate(spent("", r, log_p), log_p, r, BestOfN(4)))
            if law == "normal":
                assert raw == pytest.approx(0.844, abs=0.004)
            else:
                heavy_raw.append(raw)
    assert max(heavy_raw) < 0.84 and np.mean(heavy_raw) < 0.80


def test_spread_of_the_estimated_calibration() -> None:
    rng = np.random.default_rng(0)
    top = [float(theory.calibrate_from_samples(11.0, R[rng.choice(4, 100, p=P)])) for _ in range(4000)]
    assert np.mean(top) == pytest.approx(0.95, abs=1e-3) and np.std(top) == pytest.approx(0.0150, abs=6e-4)
    assert theory.calibrate_from_samples([-9.0, 0.0, 9.0], [0.0, 1.0], smoothed=True) == pytest.approx([1 / 6, 1 / 3, 5 / 6])


@pytest.mark.parametrize("procedure", [Identity(), BestOfN(3), WorstOfN(3)], ids=lambda p: p.name)
def test_sampled_win_rate_is_the_mean_over_all_subsets(procedure: theory.Procedure) -> None:
    rng = np.random.default_rng(2)
    policy, reference = rng.integers(0, 6, (4, 6)).astype(float), rng.integers(0, 6, (4, 6)).astype(float)
    pick, size = {"identity": (max, 1), "best-of-n": (max, 3), "worst-of-n": (min, 3)}[procedure.name]
    brute = []
    for a, b in zip(policy, reference, strict=True):
        ours = [pick(s) for s in itertools.combinations(a, size)]
        theirs = [pick(s) for s in itertools.combinations(b, size)]
        brute.append(np.mean([(x > y) + (x == y) / 2 for x in ours for y in theirs]))
    found = theory.inference_win_rate(policy, reference, procedure)
    assert found.per_prompt == pytest.approx(brute)
    assert found.mean == pytest.approx(np.mean(brute))
    assert found.standard_error == pytest.approx(np.std(brute, ddof=1) / 2)


def test_sampled_win_rate_agrees_with_the_exact_one() -> None:
    rng = np.random.default_rng(3)
    phi = theory.as_transform("exp:4")(theory.calibrate(LOG_P, R))
    log_q = theory.tilt(LOG_P, phi, theory.solve_alpha(LOG_P, phi, 0.3))
    policy, reference = R[rng.choice(4, (400, 40), p=np.exp(log_q))], R[rng.choice(4, (400, 40), p=P)]
    for procedure in (Identity(), BestOfN(4), WorstOfN(4)):
        found = theory.inference_win_rate(policy, reference, procedure)
        assert abs(found.mean - float(theory.exact_win_rate(log_q, LOG_P, R, procedure))) < 4 * found.standard_error


@pytest.mark.parametrize("procedure", [Identity(), BestOfN(4), WorstOfN(3), BestOfN(2.5)], ids=repr)
def test_a_procedure_is_consistent_with_itself(procedure: theory.Procedure) -> None:
    r = rule()
    assert r.integral(procedure.density(r.u)) == pytest.approx(1, rel=1e-12)
    assert r.cumulative(procedure.density(r.u)) == pytest.approx(procedure.cumulative(r.u), abs=1e-12)
    count = 20_000
    log_p = np.full(count, -np.log(count))
    u = (np.arange(count) + 0.5) / count
    assert np.exp(procedure.log_pmf(log_p, u)) * count == pytest.approx(procedure.density(u), abs=2e-3)


def test_procedures_choose_among_sampled_answers() -> None:
    rewards = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 0.0]])
    assert BestOfN(3).choose(rewards).tolist() == [1, 0]
    assert WorstOfN(3).choose(rewards).tolist() == [0, 1]
    assert Identity().choose(rewards).tolist() == [0, 0]
    assert theory.as_procedure("best_of_n", 4) == BestOfN(4)
    assert BestOfN(3).weights(10) @ np.arange(10.0) == pytest.approx(7.25)
    assert WorstOfN(3).weights(10) @ np.arange(10.0) == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.frontier("identity", beta=0.0), "beta: must be above 0, got 0"),
        (lambda: theory.frontier("identity"), "either beta or kl"),
        (lambda: theory.frontier("identity", beta=1.0, kl=1.0), "either beta or kl"),
        (lambda: theory.frontier("identity", kl=-1.0), "at least 0 nats"),
        (lambda: theory.frontier(lambda c: 0 * c, kl=0.5), "cannot spend 0.5 nats"),
        (lambda: theory.frontier(lambda c: np.where(c > 0.5, np.nan, c), kl=0.5), "NaN"),
        (lambda: theory.frontier("identity", "best-of-n", kl=0.5), "as n=4"),
        (lambda: theory.frontier("identity", BestOfN(4), 3, kl=0.5), "n=4 already"),
        (lambda: theory.inference_win_rate([[1.0, np.nan]], [[1.0, 2.0]], "identity"), r"policy_rewards: entry \(0, 1\)"),
        (lambda: theory.inference_win_rate([[1.0, 2.0]], [[1.0, 2.0]], "best-of-n", 3), "between 1 and the 2 draws"),
        (lambda: theory.inference_win_rate([[1.0, 2.0]], [[1.0], [2.0]], "identity"), "same prompts"),
        (lambda: Transform.identity()([0.5, 1.5]), r"\[0, 1\], got 1.5"),
        (lambda: Transform.power(0), "above 0"),
        (lambda: Transform.exp(0.0, normalised=False), "other than 0"),
        (lambda: Transform.optimal("best-of-n", 4, kl=0.0), "above 0 nats"),
        (lambda: BestOfN(0.5), "at least 1"),
        (lambda: Identity(4), "n is 1; got 4"),
        (lambda: BestOfN(2.5).weights(10), "whole number"),
        (lambda: BestOfN(2).density([2.0]), r"\[0, 1\]"),
        (lambda: theory.calibrate_from_samples([1.0], [1.0]), "at least 2"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()


def test_a_wrong_name_is_told_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="best-of-n"):
        theory.as_procedure("best-of-m", 4)
    with pytest.raises(UnknownNameError, match="identity"):
        theory.frontier("identiy", kl=0.5)
