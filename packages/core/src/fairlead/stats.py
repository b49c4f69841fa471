"""Statistics that evaluations and recipes need: estimates with intervals and tests, thin over numpy and scipy.

Every interval says how it was made. Clusters are resampled or summed whole, since epoch copies and paraphrases of
one item are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval: `low <= estimate <= high` at `level`, from `n` observations, by `method`."""

    estimate: float
    low: float
    high: float
    n: int
    method: str
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _values(values: ArrayLike, name: str = "values") -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name}: needs a non-empty one-dimensional sequence, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: {int((~np.isfinite(array)).sum())} of {len(array)} are not finite")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level: must lie in (0, 1), as 0.95, got {level}")


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion."""
    _check_counts(successes, n)
    _check_level(level)
    from scipy.special import ndtri

    z = float(ndtri(0.5 + level / 2))
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n of n one end is the proportion itself, which rounding may pass.
    return Interval(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)), n, "Wilson", level)


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Exact (conservative) interval of a proportion."""
    _check_counts(successes, n)
    _check_level(level)
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(successes / n, low, high, n, "Clopper-Pearson", level)


def _check_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"a proportion needs 0 <= successes <= n and n >= 1, got {successes} of {n}")


def standard_error(values: ArrayLike, clusters: Sequence[Any] | None = None) -> float:
    """Standard error of the mean: s / sqrt(n), or clustered, sqrt(C/(C-1) sum_c (sum_{i in c}(v_i - mean))^2) / n.
    One observation (or one cluster) has none: NaN."""
    v = _values(values)
    if clusters is None:
        return float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else float("nan")
    sums = _cluster_sums(v - v.mean(), clusters)
    count = len(sums)
    return float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(v)) if count > 1 else float("nan")


def _cluster_sums(values: np.ndarray, clusters: Sequence[Any]) -> np.ndarray:
    if len(clusters) != len(values):
        raise InputError(f"clusters: {len(clusters)} for {len(values)} values")
    return np.bincount(_cluster_index(clusters), weights=values)


def _cluster_index(clusters: Sequence[Any]) -> np.ndarray:
    """The number of each value's cluster, in order of appearance; ids may be of any hashable kind."""
    numbers: dict[Any, int] = {}
    ids = clusters.tolist() if hasattr(clusters, "tolist") else list(clusters)
    return np.array([numbers.setdefault(c, len(numbers)) for c in ids])


def mean(values: ArrayLike, clusters: Sequence[Any] | None = None, level: float = 0.95) -> Interval:
    """Mean with a t interval; with clusters, C - 1 degrees of freedom."""
    from scipy.special import stdtrit

    v = _values(values)
    _check_level(level)
    groups = len(v) if clusters is None else len(_cluster_sums(v, clusters))
    if groups < 2:
        return Interval(float(v.mean()), float("-inf"), float("inf"), len(v), "t (undefined for one group)", level)
    half = float(stdtrit(groups - 1, 0.5 + level / 2)) * standard_error(v, clusters)
    return Interval(
        float(v.mean()), float(v.mean() - half), float(v.mean() + half), len(v),
        "t" if clusters is None else f"clustered t, {groups} clusters", level,
    )  # fmt: skip


def bootstrap(
    values: ArrayLike, statistic: Callable[[np.ndarray], float] | None = None, clusters: Sequence[Any] | None = None,
    resamples: int = 2000, level: float = 0.95, seed: int = 0, method: Literal["bca", "percentile"] = "bca",
) -> Interval:  # fmt: skip
    """Bootstrap of a statistic (the mean by default), clusters resampled whole.

    BCa corrects for bias and skew with the jackknife over observations (over clusters when given); "percentile" takes
    the plain quantiles. Without spread (one observation, one cluster, equal values) the interval is the estimate.
    """
    v = _values(values)
    _check_level(level)
    if method not in ("bca", "percentile"):
        raise InputError(f"method: must be 'bca' or 'percentile', got {method!r}")
    index = np.arange(len(v)) if clusters is None else _cluster_index(clusters)
    if len(index) != len(v):
        raise InputError(f"clusters: {len(index)} for {len(v)} values")
    order = np.argsort(index, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(index))[:-1])
    point = float(v.mean() if statistic is None else statistic(v))
    kind = f"{'BCa' if method == 'bca' else 'percentile'} bootstrap, {resamples}"
    name = kind if clusters is None else f"cluster {kind}, {len(members)} clusters"
    if len(members) < 2:
        return Interval(point, point, point, len(v), name + " (no spread)", level)
    draws, jackknife = _resampled(v, members, statistic, resamples, np.random.default_rng(seed))
    if np.ptp(draws) == 0:
        return Interval(point, point, point, len(v), name + " (no spread)", level)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca_tails(tails, draws, jackknife, point)
    low, high = np.quantile(draws, tails)
    return Interval(point, float(min(low, point)), float(max(high, point)), len(v), name, level)


def bootstrap_mean(values: ArrayLike, clusters: Sequence[Any] | None = None, seed: int = 0, level: float = 0.95) -> Interval:
    """BCa bootstrap of the mean, 2000 resamples; clusters are resampled whole."""
    return bootstrap(values, clusters=clusters, seed=seed, level=level)


def _resampled(
    v: np.ndarray, members: list[np.ndarray], statistic: Callable[[np.ndarray], float] | None, resamples: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The statistic over resamples, and with each cluster left out. Means are computed from the clusters' sums."""
    count = len(members)
    if statistic is None:
        sums = np.array([v[m].sum() for m in members])
        sizes = np.array([len(m) for m in members], dtype=float)
        draws = np.empty(resamples)
        step = max(1, 4_000_000 // count)
        for start in range(0, resamples, step):
            chosen = rng.integers(0, count, (min(step, resamples - start), count))
            draws[start : start + len(chosen)] = sums[chosen].sum(1) / sizes[chosen].sum(1)
        return draws, (sums.sum() - sums) / (sizes.sum() - sizes)
    draws = np.array(
        [statistic(v[np.concatenate([members[c] for c in rng.integers(0, count, count)])]) for _ in range(resamples)]
    )
    jackknife = np.array([statistic(np.delete(v, m)) for m in members])
    return draws, jackknife


def _bca_tails(tails: np.ndarray, draws: np.ndarray, jackknife: np.ndarray, point: float) -> np.ndarray:
    """The quantiles to take in place of the nominal ones (Efron 1987): bias z0 and acceleration a."""
    from scipy.special import ndtr, ndtri

    below = ((draws < point).sum() + (draws <= point).sum()) / (2 * len(draws))
    z0 = ndtri(np.clip(below, 1 / (2 * len(draws)), 1 - 1 / (2 * len(draws))))
    away = jackknife.mean() - jackknife
    spread = (away**2).sum() ** 1.5
    acceleration = (away**3).sum() / (6 * spread) if spread > 0 else 0.0
    z = z0 + ndtri(tails)
    return ndtr(z0 + z / (1 - acceleration * z))


def binomial_test(
    successes: int, n: int, p: float = 0.5, alternative: Literal["two-sided", "less", "greater"] = "two-sided"
) -> float:
    """Exact p-value of "each of n trials succeeds with probability p"."""
    from scipy.stats import binomtest

    _check_counts(successes, n)
    if not 0 <= p <= 1:
        raise InputError(f"p: must lie in [0, 1], got {p}")
    return float(binomtest(successes, n, p, alternative).pvalue)


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[Any] | None = None, level: float = 0.95
) -> Interval:
    """Mean of a - b over aligned items, with a t interval (clustered when clusters are given)."""
    x, y = _values(a, "a"), _values(b, "b")
    if len(x) != len(y):
        raise InputError(f"paired difference: {len(x)} against {len(y)} items")
    found = mean(x - y, clusters, level)
    return Interval(found.estimate, found.low, found.high, found.n, "paired " + found.method, level)


def sign_flip(differences: ArrayLike, resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of "the differences are symmetric about zero" by flipping signs; exact up to 14 items."""
    d = _values(differences, "differences")
    observed = abs(d.mean())
    if len(d) <= 14:
        signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * len(d))).reshape(len(d), -1)
        return float((np.abs(d @ signs / len(d)) >= observed - 1e-12).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, resamples, 2000):
        count = min(2000, resamples - start)
        flips = rng.integers(0, 2, (count, len(d))) * 2.0 - 1
        hits += int((np.abs(flips @ d / len(d)) >= observed - 1e-12).sum())
    return (hits + 1) / (resamples + 1)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided McNemar p-value of two aligned binary outcomes."""
    from scipy.stats import binomtest

    x, y = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if x.shape != y.shape:
        raise InputError(f"McNemar: {len(x)} against {len(y)} items")
    only_a, only_b = int((x & ~y).sum()), int((~x & y).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b).pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values, in input order."""
    p = _probabilities(p_values)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted


def benjamini_hochberg(p_values: ArrayLike) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values (false discovery rate), in input order."""
    p = _probabilities(p_values)
    order = np.argsort(p)[::-1]
    adjusted = np.empty_like(p)
    ranks = np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(1, np.minimum.accumulate(len(p) / ranks * p[order]))
    return adjusted


def _probabilities(p_values: ArrayLike) -> np.ndarray:
    p = _values(p_values, "p_values")
    if ((p < 0) | (p > 1)).any():
        raise InputError(f"p_values: must lie in [0, 1], got {float(p[(p < 0) | (p > 1)][0])}")
    return p
