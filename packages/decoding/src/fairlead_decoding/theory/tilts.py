"""The exponential tilt phi_alpha = p exp(alpha r) / Z: the best reward for a budget of KL divergence.

Yang, Salamatian, Sun, Suresh, Beirami, "Asymptotics of Language Model Alignment" (arXiv 2404.01730). alpha is 1 / beta of
the usual objective E r - beta KL. Natural logarithms, nats, float64. A distribution is log-probabilities over M outcomes,
[M] or [B, M]; -inf is an outcome that is never drawn, so ragged rows are padded with -inf. Which outcomes there are is
the caller's; best-of-n is best_of_n's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError

from ._inputs import Array, as_finite, as_float64, as_log_distribution, as_problem, divergence, expectation, logsumexp

TOLERANCE = 1e-12
_STEPS = 200


def tilt(log_p: ArrayLike, r: ArrayLike, alpha: ArrayLike) -> Array:
    """log phi_alpha, the distribution p exp(alpha r) / Z(alpha): float64 of the shape of log_p.

    log_p, r: float64 [M] or [B, M]. alpha: real, [B] for one per row; 0 gives p, below 0 the worst direction, inf p
    conditioned on its best outcomes, -inf on its worst.
    InputError: log_p is not normalised within 1e-6, or r is not finite.
    """
    log_p, r = as_problem(log_p, r)
    alpha = np.asarray(as_float64(alpha, "alpha"))
    if alpha.ndim > 1 or (alpha.ndim == 1 and (log_p.ndim == 1 or len(alpha) != len(log_p))):
        raise InputError(f"alpha: must be one number, or one per row of log_p {list(log_p.shape)}, got shape {list(alpha.shape)}")
    return _tilt(log_p, r, alpha[..., None])


def _tilt(log_p: Array, r: Array, alpha: Array) -> Array:
    """As `tilt`, alpha of a shape that broadcasts against log_p."""
    support = log_p > -np.inf
    # Measured from the end that alpha favours, every exponent is at most 0 and none overflows.
    best = np.where(alpha < 0, _extreme(r, support, np.min, np.inf), _extreme(r, support, np.max, -np.inf))
    distance = np.where(support, r - best, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        exponent = np.where(distance == 0, 0.0, alpha * distance)
    log_phi = log_p + exponent
    return np.asarray(log_phi - logsumexp(log_phi, keep=True))


def _extreme(r: Array, support: Array, reduce: Callable[..., Any], other: float) -> Array:
    return np.asarray(reduce(np.where(support, r, other), axis=-1, keepdims=True))


def log_partition(log_p: ArrayLike, r: ArrayLike, alpha: ArrayLike) -> Array:
    """log Z(alpha) = log E_p exp(alpha r), finite alpha: float64 [] or [B]. Its first two derivatives are the mean and
    the variance of r under phi_alpha."""
    log_p, r = as_problem(log_p, r)
    alpha = as_finite(alpha, "alpha")[..., None]
    return logsumexp(np.where(log_p > -np.inf, log_p + alpha * r, -np.inf))


def expected(log_pi: ArrayLike, r: ArrayLike) -> Array:
    """E_pi r: float64 [] or [B]."""
    log_pi, r = as_problem(log_pi, r)
    return expectation(log_pi, r)


def variance(log_pi: ArrayLike, r: ArrayLike) -> Array:
    """Var_pi r: float64 [] or [B]."""
    log_pi, r = as_problem(log_pi, r)
    return expectation(log_pi, (r - expectation(log_pi, r)[..., None]) ** 2)


def kl_divergence(log_a: ArrayLike, log_b: ArrayLike) -> Array:
    """KL(a || b) in nats: float64 [] or [B]; inf where a draws what b never does."""
    log_a, log_b = as_log_distribution(log_a, "log_a"), as_log_distribution(log_b, "log_b")
    if log_a.shape[-1] != log_b.shape[-1]:
        raise InputError(f"log_b: must be over the {log_a.shape[-1]} outcomes of log_a, got {log_b.shape[-1]}")
    return divergence(log_a, log_b)


def kl_max(log_p: ArrayLike, r: ArrayLike) -> Array:
    """The divergence at which the tilt has nothing left to gain: -log p(best outcomes), float64 [] or [B]."""
    log_p, r = as_problem(log_p, r)
    best = _extreme(r, log_p > -np.inf, np.max, -np.inf)
    return np.asarray(np.maximum(-logsumexp(np.where(r == best, log_p, -np.inf)), 0.0))


def solve_alpha(log_p: ArrayLike, r: ArrayLike, kl: ArrayLike, *, shared: bool = True) -> Any:
    """alpha >= 0 with KL(phi_alpha || p) = kl, to 1e-12 relative.

    kl: nats, at least 0. shared: with [B, M], one alpha for all rows such that the mean divergence is kl, which is the
    optimum under a budget on average; False solves each row for its own budget (kl may then be [B]).
    Returns a float, or float64 [B] for shared=False with [B, M]. 0 for kl = 0, inf where kl is at least `kl_max` or
    the reward is constant: `tilt` takes it.
    """
    log_p, r = as_problem(log_p, r)
    budget = as_float64(kl, "kl")
    if (budget < 0).any():
        raise InputError(f"kl: must be at least 0 nats, got {float(budget.min())}")
    if budget.ndim and (shared or log_p.ndim == 1 or budget.shape != log_p.shape[:1]):
        raise InputError(f"kl: one number is needed (one per row only with shared=False), got shape {list(budget.shape)}")
    log_p2, r2 = np.atleast_2d(log_p), np.atleast_2d(r)
    most = kl_max(log_p2, r2)
    if shared:
        alpha = _solve(lambda a: tuple(np.mean(v, keepdims=True) for v in _divergence(log_p2, r2, a)), np.atleast_1d(budget), most.mean(keepdims=True), r2)
        return float(alpha[0])
    alpha = _solve(lambda a: _divergence(log_p2, r2, a), np.broadcast_to(budget, most.shape), most, r2)
    return float(alpha[0]) if log_p.ndim == 1 else alpha


def _divergence(log_p: Array, r: Array, alpha: Array) -> tuple[Array, Array]:
    """KL(phi_alpha || p) and its derivative by alpha, alpha Var_phi r, per row: [B] each; alpha is [B] or [1]."""
    support = log_p > -np.inf
    centred = np.where(support, r - expectation(log_p, r)[..., None], 0.0)
    alpha = alpha[:, None]
    log_phi = _tilt(log_p, centred, alpha)
    mean = expectation(log_phi, centred)
    with np.errstate(over="ignore", invalid="ignore"):
        x = alpha * centred
        # E_p x = 0, so for small x both terms of KL = alpha E_phi r - log Z are of second order, computed as such.
        small = np.log1p(expectation(log_p, np.expm1(np.clip(x, -1, 1)) - np.clip(x, -1, 1)))
        kl = np.where(np.abs(x).max(-1) < 1e-2, alpha[:, 0] * mean - small, divergence(log_phi, log_p))
    return kl, alpha[:, 0] * expectation(log_phi, (centred - mean[:, None]) ** 2)


def _solve(spent: Callable[[Array], tuple[Array, ...]], kl: Array, most: Array, r: Array) -> Array:
    """Roots of spent(alpha) = kl, one per entry: Newton on log KL against log alpha inside a bracket."""
    spread = max(float(np.ptp(r, axis=-1).max()), 1e-300)
    alpha = np.where(kl > 0, np.inf, 0.0)
    wanted = (kl > 0) & (kl < most)
    if not wanted.any():
        return alpha
    target = np.log(np.where(wanted, kl, 1.0))

    def gap(x: Array) -> tuple[Array, Array]:
        """log KL - log kl and its slope at log alpha = x."""
        value, slope = spent(np.exp(x))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(value > 0, np.log(value), -np.inf) - target, np.exp(x) * slope / value

    low = high = np.where(wanted, np.log(np.sqrt(2 * np.minimum(kl, 1.0)) / spread), 0.0)
    # From where the small-budget formula points, outwards until the root lies between; then Newton.
    step, short = 1.0, wanted & (gap(high)[0] <= 0)
    while short.any() and (high + np.log(spread) < 700).all():
        high, step = np.where(short, high + step, high), step * 1.5
        short = wanted & (gap(high)[0] <= 0)
    unreachable = short  # kl is kl_max but for rounding
    step, over = 1.0, wanted & (gap(low)[0] > 0)
    while over.any():
        low, step = np.where(over, low - step, low), step * 1.5
        over = wanted & (gap(low)[0] > 0)
    x = (low + high) / 2
    for _ in range(_STEPS):
        value, slope = gap(x)
        low, high = np.where(value <= 0, x, low), np.where(value > 0, x, high)
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = x - value / slope
        inside = (newton > low) & (newton < high)
        following = np.where(inside, newton, (low + high) / 2)
        done = np.abs(following - x) < TOLERANCE
        x = following
        if (done | ~wanted | unreachable).all():
            break
    return np.where(wanted & ~unreachable, np.exp(x), alpha)


def alpha_for_reward(log_p: ArrayLike, r: ArrayLike, reward: float) -> float:
    """The alpha, of either sign, with E_{phi_alpha} r = reward, for one distribution [M].

    inf or -inf at the largest or smallest reward that p can draw; InputError for a reward beyond them.
    """
    from scipy.optimize import brentq

    log_p, r = as_problem(log_p, r)
    if log_p.ndim != 1:
        raise InputError(f"log_p: one distribution [M] is needed, got shape {list(log_p.shape)}")
    support = log_p > -np.inf
    low, high = float(r[support].min()), float(r[support].max())
    if not low <= reward <= high:
        raise InputError(f"reward: must lie between {low:.6g} and {high:.6g}, the rewards that can be drawn, got {reward}")
    middle = float(expectation(log_p, r))
    if low == high or abs(reward - middle) <= 1e-15 * max(abs(low), abs(high)):
        return 0.0
    if reward in (low, high):
        return np.inf if reward == high else -np.inf
    sign = 1.0 if reward > middle else -1.0

    def excess(x: float) -> float:
        return float(expectation(_tilt(log_p, r, np.array([sign * x])), r)) - reward

    end = 1.0 / (high - low)
    while sign * excess(end) <= 0:
        end *= 2
        if end * (high - low) > 1e17:  # the reward is the extreme one but for rounding
            return sign * np.inf
    return sign * float(brentq(excess, 0.0, end, xtol=1e-300, rtol=4 * np.finfo(float).eps, maxiter=500))


def kl_to_tilt(log_p: ArrayLike, r: ArrayLike, alpha: ArrayLike, kl: ArrayLike, reward: ArrayLike) -> Array:
    """KL(pi || phi_alpha) of a policy known only by its divergence KL(pi || p) and its expected reward.

    The identity KL(pi||phi) = KL(pi||p) - KL(phi||p) + alpha (E_phi r - E_pi r) holds for every pi: a policy within
    alpha eps of the frontier's reward at its budget is within alpha eps of the tilt itself. float64 [] or [B].
    """
    log_p, r = as_problem(log_p, r)
    alpha = as_finite(alpha, "alpha")
    log_phi = tilt(log_p, r, alpha)
    phi_kl = kl_divergence(log_phi, log_p)
    return np.asarray(as_finite(kl, "kl") - phi_kl + alpha * (expectation(log_phi, r) - as_finite(reward, "reward")))
