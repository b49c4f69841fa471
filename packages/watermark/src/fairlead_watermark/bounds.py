"""What theory says of marks and of resampling: numbers to hold measurements against.

Sources: arXiv 2506.04462 (Theorem 4.1: best-of-n of marked samples), arXiv 2301.10226 (spike entropy), the Gumbel
watermark's expected score, and the shift of a two-way decision under random green lists (derived here).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError

CONSTANT = 1.0 / math.sqrt(math.pi * math.log(2.0))
"""C / sigma of the bound: E max of n standard normals >= CONSTANT sqrt(ln n), with equality at n = 1 and 2."""


def expected_maximum(n: int) -> float:
    """E of the largest of n independent standard normals, by quadrature."""
    if n < 1:
        raise InputError(f"n: at least 1 is needed, got {n}")
    from scipy.integrate import quad
    from scipy.special import log_ndtr

    def integrand(x: float) -> float:
        return x * n * math.exp(-0.5 * x * x + (n - 1) * float(log_ndtr(x))) / math.sqrt(2 * math.pi)

    return float(quad(integrand, -10, 10, epsabs=1e-11, limit=400)[0])


def resampling_gain(n: float, sigma: float) -> float:
    """C sqrt(ln n): the least gain of best-of-n when rewards within a prompt are Gaussian with deviation sigma."""
    if n < 1 or sigma < 0:
        raise InputError(f"n >= 1 and sigma >= 0 are needed, got n={n}, sigma={sigma}")
    return CONSTANT * sigma * math.sqrt(math.log(n))


def resampling_bound(n: float, sigma: float, eps: float) -> float:
    """E reward of best-of-n marked answers minus that of unmarked ones is at least this; eps is what the mark cost."""
    return resampling_gain(n, sigma) - eps


def candidates_needed(eps: float, sigma: float) -> int:
    """The n at which the bound reaches the unmarked reward: ceil(exp((eps / C)^2)), at least 1."""
    if sigma <= 0:
        if eps <= 0:
            return 1
        raise InputError("sigma: must be above 0, equal candidates never repair anything")
    return max(1, math.ceil(math.exp((max(eps, 0.0) / (CONSTANT * sigma)) ** 2) - 1e-9))


def kl_price(n: int) -> float:
    """Upper bound of the KL divergence of best-of-n from the marked model: ln n - (n - 1) / n."""
    if n < 1:
        raise InputError(f"n: at least 1 is needed, got {n}")
    return math.log(n) - (n - 1) / n


def gumbel_score_mean(probabilities: ArrayLike) -> float:
    """E of -ln(1 - u) of the token that plain Gumbel picks: sum_v p_v H(1 / p_v), H the continued harmonic number.
    1 without choice, H_V for V equal tokens."""
    from scipy.special import digamma

    p = _distribution(probabilities)
    p = p[p > 0]
    return float((p * (digamma(1 / p + 1) + np.euler_gamma)).sum())


def spike_entropy(probabilities: ArrayLike, modulus: float) -> float:
    """sum_v p_v / (1 + z p_v)."""
    p = _distribution(probabilities)
    return float((p / (1 + modulus * p)).sum())


def green_probability_bound(probabilities: ArrayLike, gamma: float, delta: float) -> float:
    """Least probability that KGW emits a green token, over random lists of exactly gamma V tokens."""
    a = math.exp(delta)
    modulus = (1 - gamma) * (a - 1) / (1 + (a - 1) * gamma)
    return gamma * a / (1 + (a - 1) * gamma) * spike_entropy(probabilities, modulus)


def decision_under_kgw(q: float, gamma: float, delta: float) -> float:
    """Mean probability of an option of probability q in a two-way choice, over lists with independent membership."""
    if not 0 < q < 1:
        raise InputError(f"q: a probability in (0, 1) is needed, got {q}")
    logit = math.log(q / (1 - q))
    same = gamma**2 + (1 - gamma) ** 2
    return same * q + gamma * (1 - gamma) * (_sigmoid(logit + delta) + _sigmoid(logit - delta))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _distribution(probabilities: ArrayLike) -> np.ndarray:
    p = np.asarray(probabilities, dtype=float)
    if p.ndim != 1 or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise InputError("probabilities: a one-dimensional distribution that sums to 1 is needed")
    return p
