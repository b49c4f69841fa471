"""Best-of-n: its exact distribution, divergence, win rate and expected reward, and their estimates from draws.

Beirami et al., "Theoretical guarantees on the best-of-n alignment policy" (arXiv 2401.01879); Yang et al. (arXiv
2404.01730). log n - (n-1)/n is an upper bound of the divergence, not the divergence: exact where outcomes can be listed,
`bon_kl_estimate` elsewhere. Ties go to one of the tied draws at random. n may be real: the formulas hold. worst=True is
worst-of-n. Nats, float64, [M] or [B, M]. Drawing the answers is the decoder's business.

Shape suffixes: P prompts, K draws per prompt, N values of n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError
from fairlead.stats import Interval, bootstrap

from ._inputs import Array, as_finite, as_float64, as_n, as_problem, divergence, expectation
from .ranks import calibrate, ranks


def bon_log_pmf(log_p: ArrayLike, r: ArrayLike, n: float, worst: bool = False) -> Array:
    """log pi_n(y) = log [p(y) / p(ties of y) (F(y)^n - F-(y)^n)]: float64 of the shape of log_p.

    The difference is taken as F^n (1 - (1 - p(ties) / F)^n) in log space, and log F from the upper tail, so that tiny
    probabilities and n of 1e12 lose nothing. InputError: n below 1, log_p not normalised, r not finite.
    """
    n = as_n(n)
    log_p, r = as_problem(log_p, r)
    place = ranks(log_p, -r if worst else r)
    alive = log_p > -np.inf
    with np.errstate(invalid="ignore"):
        share = np.where(place.below == -np.inf, 0.0, np.minimum(place.group - place.upto, 0.0))
        log_hit = n * place.upto + log_any_of(np.where(alive, share, -np.inf), n)
        return np.asarray(np.where(alive, log_p - place.group + log_hit, -np.inf))


def log_any_of(log_e: ArrayLike, n: float) -> Array:
    """log(1 - (1 - e)^n), the log-probability that one of n draws hits an event of log-probability log_e <= 0."""
    log_e = np.asarray(log_e, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        # below e^-37 log(1 - e) is -e to the last bit, and e itself may underflow
        misses = np.where(log_e < -37, -np.exp(np.log(n) + log_e), n * np.log1p(-np.exp(log_e)))
        return np.asarray(np.where(misses > -1e-13, np.log(n) + log_e, np.log(-np.expm1(misses))))


def bon_kl_exact(log_p: ArrayLike, r: ArrayLike, n: float, worst: bool = False) -> Array:
    """KL(pi_n || p) in nats: float64 [] or [B]."""
    log_p, r = as_problem(log_p, r)
    return divergence(bon_log_pmf(log_p, r, n, worst), log_p)


def bon_kl_bound(n: ArrayLike, blocks: int = 1) -> Any:
    """log n - (n-1)/n, times `blocks` for blockwise best-of-n: an upper bound of the divergence, met only by rewards
    without atoms. A float, or float64 of the shape of n."""
    count = as_finite(n, "n")
    if (count < 1).any() or blocks < 1:
        raise InputError(f"n and blocks: must be at least 1, got n={float(count.min()):g}, blocks={blocks}")
    return _plain(blocks * (np.log(count) - (count - 1) / count))


def bon_win_rate_bound(n: ArrayLike) -> Any:
    """n / (n+1): an upper bound of `bon_win_rate`, met only by rewards without atoms."""
    count = as_finite(n, "n")
    if (count < 1).any():
        raise InputError(f"n: must be at least 1, got {float(count.min()):g}")
    return _plain(count / (count + 1))


def bon_kl_estimate(log_p_selected: ArrayLike, n: float) -> Any:
    """Estimate of KL(pi_n || p) from the log-probability of the selected answer: float64 of its shape, to be averaged.

    K(e) = (1-e)^n [log n + (n-1) log(1-e) - (n-1)/n] + (1 - (1-e)^n) log((1 - (1-e)^n) / e), e = p(selected): the exact
    divergence of one atom e at the top and a continuous rest. e -> 0 gives the bound, e = 1 gives 0.
    log_p_selected: the sum of the token log-probabilities of the whole answer, end token included, never divided by the
    length, of the distribution that was sampled (temperature and truncation included).
    """
    n = as_n(n)
    log_e = as_float64(log_p_selected, "log_p_selected")
    if (log_e > 1e-6).any():
        raise InputError(f"log_p_selected: log-probabilities are at most 0, got {float(log_e.max()):.6g}")
    log_e = np.minimum(log_e, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_miss = np.log1p(-np.exp(log_e))
        rest = np.where(log_miss > -np.inf, np.exp(n * log_miss) * (np.log(n) + (n - 1) * log_miss - (n - 1) / n), 0.0)
        log_top = log_any_of(log_e, n)
        top = np.where(log_e > -np.inf, np.exp(log_top) * (log_top - log_e), 0.0)
    return _plain(np.maximum(rest + top, 0.0))


def bon_win_rate(log_p: ArrayLike, r: ArrayLike, n: float, worst: bool = False) -> Array:
    """P(best of n beats one reference draw), a tie half: at most n / (n+1). float64 [] or [B]."""
    log_p, r = as_problem(log_p, r)
    return expectation(bon_log_pmf(log_p, r, n, worst), calibrate(log_p, r))


def bon_expected_rank(log_p: ArrayLike, r: ArrayLike, n: float) -> Array:
    """E F of the best of n: at least n / (n+1). float64 [] or [B]."""
    log_p, r = as_problem(log_p, r)
    return expectation(bon_log_pmf(log_p, r, n), np.exp(ranks(log_p, r).upto))


def bon_expected_reward(log_p: ArrayLike, r: ArrayLike, n: float, worst: bool = False) -> Array:
    """E r of the best of n: float64 [] or [B]."""
    log_p, r = as_problem(log_p, r)
    return expectation(bon_log_pmf(log_p, r, n, worst), r)


def n_for_kl(kl: ArrayLike) -> Any:
    """The real n with log n - (n-1)/n = kl: what n a budget of kl nats buys. A float, or float64 of the shape of kl;
    inf where n exceeds a float.

    Newton on x + exp(-x) - 1 = kl in x = log n, from above the root of a convex function: it converges monotonically,
    also at kl near 0, where the root is double. InputError for kl below 0.
    """
    budget = as_finite(kl, "kl")
    if (budget < 0).any():
        raise InputError(f"kl: must be at least 0 nats, got {float(budget.min())}")
    x = np.where(budget > 0, budget + 1 - np.exp(-budget - 1), 0.0)
    for _ in range(100):
        small = x * x / 2 - x**3 / 6 + x**4 / 24 - x**5 / 120
        excess = np.where(x < 1e-3, small, x + np.expm1(-x)) - budget
        step = np.where(x > 0, excess / np.where(x > 0, -np.expm1(-x), 1.0), 0.0)
        x = np.maximum(x - step, 0.0)
        if (np.abs(step) <= 1e-15 * np.maximum(x, 1e-300)).all():
            break
    with np.errstate(over="ignore"):
        return _plain(np.exp(x))


def order_weights(draws: int, n: int) -> Array:
    """w_i = C(i-1, n-1) / C(K, n) for the i-th smallest of K draws, i = 1..K: float64 [K], sums to 1."""
    from scipy.special import gammaln

    if not 1 <= n <= draws or int(n) != n:
        raise InputError(f"n: must be a whole number between 1 and the {draws} draws, got {n}")
    rank = np.arange(n, draws + 1)
    log_weights = gammaln(rank) - gammaln(rank - n + 1) - gammaln(n) - (gammaln(draws + 1) - gammaln(n + 1) - gammaln(draws - n + 1))
    weights = np.zeros(draws)
    weights[n - 1 :] = np.exp(log_weights)
    return np.asarray(weights / weights.sum())


def best_of_n_reward(rewards_PK: ArrayLike, n: int | Sequence[int]) -> Any:
    """Unbiased E[largest of n] from K independent draws per prompt, for any n <= K and without drawing again.

    rewards_PK: [P, K], or [K] for one prompt. n: one number, or several. Returns float64 [P] ([P, N] for several n),
    without the P for [K]. The points of one curve share their draws, so they are correlated.
    InputError: NaN, n above K or below 1.
    """
    rewards = np.sort(_draws(rewards_PK), axis=-1)
    several = np.ndim(n) > 0
    weights_NK = np.stack([order_weights(rewards.shape[-1], v) for v in np.atleast_1d(n).tolist()])
    values = rewards @ weights_NK.T
    return _plain(values if several else values[..., 0])


def best_of_n_replicates(rewards_K: ArrayLike, n: int | Sequence[int], resamples: int = 500, seed: int = 0) -> Array:
    """Bootstrap of `best_of_n_reward` over the draws of one prompt: float64 [resamples] or [resamples, N]."""
    rewards = _draws(rewards_K)
    if rewards.ndim != 1:
        raise InputError(f"rewards: the draws of one prompt [K] are needed, got shape {list(rewards.shape)}")
    rng = np.random.default_rng(seed)
    return np.asarray(best_of_n_reward(np.stack([rng.choice(rewards, len(rewards)) for _ in range(resamples)]), n))


def best_of_n_interval(rewards_PK: ArrayLike, n: int, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean over prompts of `best_of_n_reward` with an interval: prompts are resampled, or one prompt's draws."""
    rewards = _draws(rewards_PK)
    if rewards.ndim == 2 and len(rewards) > 1:
        return bootstrap(best_of_n_reward(rewards, n), resamples=resamples, level=level, seed=seed)
    rewards = rewards.reshape(-1)
    point = float(best_of_n_reward(rewards, n))
    replicates = best_of_n_replicates(rewards, n, resamples, seed)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        point, float(min(low, point)), float(max(high, point)), len(rewards),
        f"percentile bootstrap of the draws, {resamples}", level,
    )  # fmt: skip


def _draws(rewards: Any) -> Array:
    array = as_finite(rewards, "rewards")
    if array.ndim not in (1, 2) or not array.size:
        raise InputError(f"rewards: must have shape [K] or [P, K], got {list(array.shape)}")
    return array


def _plain(values: Array) -> Any:
    """A float for a scalar, else the array."""
    values = np.asarray(values)
    return values if values.ndim else float(values)
