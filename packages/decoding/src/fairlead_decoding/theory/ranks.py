"""Where an outcome stands among draws of the reference: the distribution function of the reward, with ties.

F(y) = P(r(z) <= r(y)), F-(y) = P(r(z) < r(y)), z ~ p. Win rates and the calibrated reward count a tie half
(arXiv 2404.01730, 2412.19792). Sorting and cumulative sums, O(M log M) per row, in log space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError

from ._inputs import Array, as_finite, as_log_distribution, as_problem, expectation


@dataclass(frozen=True)
class Ranks:
    """Logarithms per outcome, each float64 of the shape of log_p: `group` p(equal rewards), `upto` F, `below` F-,
    `above` 1 - F. All are exact 0 or -inf where they are."""

    group: Array
    upto: Array
    below: Array
    above: Array


def ranks(log_p: ArrayLike, r: ArrayLike) -> Ranks:
    """The ranks of every outcome of [M] or [B, M]; rewards are equal when their float64 values are."""
    log_p, r = as_problem(log_p, r)
    shape = log_p.shape
    log_p, r = np.atleast_2d(log_p), np.atleast_2d(r)
    rows, count = log_p.shape
    order = np.argsort(r, axis=-1, kind="stable")
    sorted_p, sorted_r = (np.take_along_axis(v, order, -1) for v in (log_p, r))
    starts = np.ones((rows, count), dtype=bool)
    starts[:, 1:] = sorted_r[:, 1:] != sorted_r[:, :-1]
    first = np.flatnonzero(starts)  # rows lie one after another, and each row starts a group
    member = np.cumsum(starts.ravel()) - 1
    ends = np.append(first[1:], rows * count) - 1
    group = np.logaddexp.reduceat(sorted_p.ravel(), first)
    rising = np.logaddexp.accumulate(sorted_p, axis=-1)
    falling = np.logaddexp.accumulate(sorted_p[:, ::-1], axis=-1)[:, ::-1]
    edge = np.full((rows, 1), -np.inf)
    below = np.concatenate([edge, rising[:, :-1]], -1).ravel()[first]
    above = np.concatenate([falling[:, 1:], edge], -1).ravel()[ends]
    # The smaller of the two tails is the accurate one; the other is its complement.
    small = above < np.log(0.5)
    upto = np.where(small, np.log1p(-np.exp(np.minimum(above, 0.0), where=small, out=np.zeros_like(above))), rising.ravel()[ends])
    found = []
    for values in (group, np.minimum(upto, 0.0), below, above):
        back = np.empty((rows, count))
        np.put_along_axis(back, order, values[member].reshape(rows, count), -1)
        found.append(back.reshape(shape))
    return Ranks(*found)


def calibrate(log_p: ArrayLike, r: ArrayLike) -> Array:
    """C(y) = P(r(z) < r(y)) + P(r(z) = r(y)) / 2 under the reference: float64 in [0, 1] of the shape of log_p.

    E_p C = 1/2; uniform where r has no atoms; unchanged by any increasing map of r (arXiv 2412.19792).
    """
    place = ranks(log_p, r)
    return np.asarray(np.exp(place.below) + np.exp(place.group) / 2)


def calibrate_from_samples(rewards: ArrayLike, reference_rewards: ArrayLike, *, smoothed: bool = False) -> Array:
    """Estimate of C from K rewards [K] of reference answers to the same prompt: float64 of the shape of `rewards`.

    (below + equal / 2) / K by two binary searches. smoothed=True gives (below + equal / 2 + 1/2) / (K + 1), which is
    never 0 or 1, as the log transform needs.
    """
    rewards, reference = as_finite(rewards, "rewards"), np.sort(as_finite(reference_rewards, "reference_rewards"))
    if reference.ndim != 1 or len(reference) < 2:
        raise InputError(f"reference_rewards: at least 2 rewards of one prompt are needed, got shape {list(reference.shape)}")
    count = (np.searchsorted(reference, rewards, "left") + np.searchsorted(reference, rewards, "right")) / 2
    return np.asarray((count + 0.5) / (len(reference) + 1) if smoothed else count / len(reference))


def win_rate(log_a: ArrayLike, log_b: ArrayLike, r: ArrayLike) -> Array:
    """P(r(y) > r(z)) + P(r(y) = r(z)) / 2 for y ~ a, z ~ b over one set of outcomes: float64 [] or [B]."""
    log_a = as_log_distribution(log_a, "log_a")
    return expectation(log_a, calibrate(log_b, r))
