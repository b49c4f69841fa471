"""The memoryless model: answers of m independent letters y_t ~ p with the reward r(y) = sum_t log q(y_t).

Yang et al., "Asymptotics of Language Model Alignment" (arXiv 2404.01730). Every linear reward has this form (q need not
be normalised). The tilt factorises into the mismatched tilted letter law T(p, q, alpha) ~ p q^alpha, so cumulants and
large deviations are one-letter formulas, and best-of-n is exact through types (letter counts). Natural logarithms, nats,
float64; p, q are distributions over A letters, q > 0 where p > 0 (InputError else).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError

from ._inputs import Array, as_finite, as_letters, expectation, logsumexp
from .best_of_n import bon_log_pmf
from .tilts import alpha_for_reward, expected, kl_divergence, solve_alpha, tilt

MOST_TYPES = 5_000_000


def mismatched_tilt(p: ArrayLike, q: ArrayLike, alpha: float) -> Array:
    """T(p, q, alpha) ~ p q^alpha over the letters that p draws: float64 [A]; alpha may be inf or -inf."""
    log_p, log_q = as_letters(p, q)
    law = np.zeros(np.shape(p))
    law[np.asarray(p, dtype=float) > 0] = np.exp(tilt(log_p, log_q, alpha))
    return law


def cumulant(p: ArrayLike, q: ArrayLike, s: ArrayLike) -> Any:
    """Lambda(s) = log sum_a p(a) q(a)^s, the log-moment generating function of one letter's reward."""
    log_p, log_q = as_letters(p, q)
    x = as_finite(s, "s")[..., None] * log_q
    # Near s = 0 the sum is 1 and its logarithm the first-order rest, which log-sum-exp would lose.
    near = np.log1p((np.exp(log_p) * np.expm1(np.clip(x, -1, 1))).sum(-1))
    return _plain(np.where(np.abs(x).max(-1) < 0.1, near, logsumexp(log_p + x)))


def renyi_cross_entropy(p: ArrayLike, q: ArrayLike, rho: ArrayLike) -> Any:
    """H_rho(p || q) = log(sum p q^(rho-1)) / (1 - rho); at rho = 1 the cross entropy -sum p log q."""
    log_p, log_q = as_letters(p, q)
    order = as_finite(rho, "rho")
    t = order - 1
    mean, spread = expectation(log_p, log_q), expectation(log_p, (log_q - expectation(log_p, log_q)) ** 2)
    close = np.abs(t) * np.abs(log_q).max() < 1e-6
    exact = -np.asarray(cumulant(p, q, t)) / np.where(close, 1.0, t)
    return _plain(np.where(close, -mean - t * spread / 2, exact))


def scaled_cumulant(p: ArrayLike, q: ArrayLike, t: ArrayLike, alpha: float = 0.0) -> Any:
    """(1/m) log E exp(t r) under the aligned model phi_alpha: Lambda(alpha + t) - Lambda(alpha). alpha = 0 is the model
    itself, where it equals -t H_{1+t}(p || q)."""
    return _plain(np.asarray(cumulant(p, q, alpha + as_finite(t, "t"))) - cumulant(p, q, alpha))


def letter_alpha(p: ArrayLike, q: ArrayLike, delta: float) -> float:
    """alpha of the aligned model that spends delta nats per letter; it does not depend on the length."""
    return float(solve_alpha(*as_letters(p, q), delta))


def rate_function(p: ArrayLike, q: ArrayLike, alpha: float, theta: ArrayLike) -> Any:
    """J(theta), the exponential rate of P(r / m near theta) under phi_alpha: float64 of the shape of theta.

    J = KL(T(p,q,b) || T(p,q,alpha)) with E_{T(b)} log q = theta, which is sup_t {t theta - Lambda(alpha+t) + Lambda(alpha)}.
    0 at theta = E_{T(alpha)} log q; inf outside the letters' rewards; at an end, -log T(p,q,alpha)(extreme letters).
    """
    log_p, log_q = as_letters(p, q)
    alpha = float(as_finite(alpha, "alpha"))
    log_phi = tilt(log_p, log_q, alpha)

    def rate(value: float) -> float:
        if not log_q.min() <= value <= log_q.max():
            return np.inf
        return float(kl_divergence(tilt(log_p, log_q, alpha_for_reward(log_p, log_q, value)), log_phi))

    values = as_finite(theta, "theta")
    return _plain(np.array([rate(v) for v in values.ravel()]).reshape(values.shape))


def types(p: ArrayLike, q: ArrayLike, m: int) -> tuple[Array, Array]:
    """All C(m+A-1, A-1) letter counts of m letters: log-probability [M] and reward [M], without listing A^m answers.

    Equal rewards are equal floats (rounded to 1e-12 of the largest), so that they count as ties.
    """
    log_p, log_q = as_letters(p, q)
    letters = len(log_p)
    if m < 1 or comb(m + letters - 1, letters - 1) > MOST_TYPES:
        raise InputError(f"m: at least 1 and at most {MOST_TYPES} types are needed, got m={m} with {letters} letters")
    from scipy.special import gammaln

    counts = np.zeros((1, 0), dtype=np.int64)
    left = np.array([m])
    for _ in range(letters - 1):
        grown = np.repeat(np.arange(len(left)), left + 1)
        used = np.arange(len(grown)) - np.repeat(np.cumsum(left + 1) - (left + 1), left + 1)
        counts = np.column_stack([counts[grown], used])
        left = left[grown] - used
    counts = np.column_stack([counts, left])
    log_mass = gammaln(m + 1) - gammaln(counts + 1).sum(-1) + counts @ log_p
    reward = counts @ log_q
    unit = 2.0 ** np.ceil(np.log2(max(float(np.abs(reward).max()), 1e-300) * 1e-12))
    return log_mass - logsumexp(log_mass), np.round(reward / unit) * unit


@dataclass(frozen=True)
class LengthResult:
    """Best-of-exp(m delta) and the tilt of the same budget at length m; all figures per letter, in nats.

    `kl_bon` is KL(best-of-n || model), `kl_bon_tilt` is KL(best-of-n || tilt); both and the reward gap go to their
    limits (delta, 0 and 0) as m grows, slowly, about as log m / m.
    """

    m: int
    n: float
    alpha: float
    reward_tilt: float
    reward_bon: float
    kl_bon: float
    kl_bon_tilt: float

    @property
    def gap(self) -> float:
        """Reward per letter of the tilt over that of best-of-n."""
        return self.reward_tilt - self.reward_bon


def best_of_n_at_length(p: ArrayLike, q: ArrayLike, m: int, delta: float) -> LengthResult:
    """Exact comparison at length m with n = exp(m delta), by types."""
    if not 0 < delta * m < 700:
        raise InputError(f"delta: m delta must lie in (0, 700) so that n = exp(m delta) is a number, got {m} x {delta}")
    n = float(np.exp(m * delta))
    alpha = letter_alpha(p, q, delta)
    log_mass, reward = types(p, q, m)
    log_bon, log_phi = bon_log_pmf(log_mass, reward, n), tilt(log_mass, reward, alpha)
    rewards = (float(expected(v, reward)) for v in (log_phi, log_bon))
    divergences = (float(kl_divergence(log_bon, v)) for v in (log_mass, log_phi))
    return LengthResult(m, n, alpha, *(v / m for v in rewards), *(v / m for v in divergences))


def _plain(values: Array) -> Any:
    values = np.asarray(values)
    return values if values.ndim else float(values)
