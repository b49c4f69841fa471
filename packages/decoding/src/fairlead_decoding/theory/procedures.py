"""What is done with a model's samples at inference time: nothing, best-of-n, or an attacker's worst-of-n.

Balashankar et al., "InfAlign" (arXiv 2412.19792): a calibrated procedure re-weights an outcome by its quantile alone,
T(pi)(y) = pi(y) g(C(y)) with g on [0, 1] of integral 1, for rewards without atoms. Each procedure here has g, its
antiderivative, its exact distribution on outcomes that can be listed, the weights that make win rates unbiased, and the
rule that picks one of n sampled answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError, UnknownNameError

from ._inputs import Array, as_finite, as_float64, as_n, as_problem
from .best_of_n import bon_log_pmf, order_weights


@dataclass(frozen=True)
class Procedure(ABC):
    """A calibrated inference-time procedure. `n` is the number of answers drawn; real n serves the formulas alone.
    `name` is what `as_procedure` takes."""

    n: float = 1
    name: ClassVar[str]

    def __post_init__(self) -> None:
        as_n(self.n)

    @abstractmethod
    def density(self, u: ArrayLike) -> Array:
        """g(u) for quantiles u in [0, 1]."""

    @abstractmethod
    def cumulative(self, u: ArrayLike) -> Array:
        """G(u), the integral of g from 0 to u."""

    @abstractmethod
    def log_pmf(self, log_p: ArrayLike, r: ArrayLike) -> Array:
        """Exact log-distribution of the answer that is returned: float64 [M] or [B, M], ties at random."""

    @abstractmethod
    def weights(self, draws: int) -> Array:
        """Weight of the i-th smallest of `draws` rewards in the mean over all n-subsets: float64 [draws], sums to 1."""

    @abstractmethod
    def choose(self, rewards_PN: ArrayLike) -> Array:
        """Which of the n sampled answers of each prompt is returned: int64 [P]; the first one among equals."""


class Identity(Procedure):
    """One sample is served as it is."""

    name = "identity"

    def __post_init__(self) -> None:
        if self.n != 1:
            raise InputError(f"n: identity serves one answer, so n is 1; got {self.n}")

    def density(self, u: ArrayLike) -> Array:
        return np.ones_like(_quantiles(u))

    def cumulative(self, u: ArrayLike) -> Array:
        return _quantiles(u)

    def log_pmf(self, log_p: ArrayLike, r: ArrayLike) -> Array:
        return as_problem(log_p, r)[0]

    def weights(self, draws: int) -> Array:
        return order_weights(draws, 1)

    def choose(self, rewards_PN: ArrayLike) -> Array:
        return np.zeros(len(as_finite(rewards_PN, "rewards")), dtype=np.int64)


class BestOfN(Procedure):
    """The best of n answers under the reward: g(u) = n u^(n-1)."""

    name = "best-of-n"

    def density(self, u: ArrayLike) -> Array:
        return self.n * _quantiles(u) ** (self.n - 1)

    def cumulative(self, u: ArrayLike) -> Array:
        return np.asarray(_quantiles(u) ** self.n)

    def log_pmf(self, log_p: ArrayLike, r: ArrayLike) -> Array:
        return bon_log_pmf(log_p, r, self.n)

    def weights(self, draws: int) -> Array:
        return order_weights(draws, int(self.n) if self.n == int(self.n) else 0)

    def choose(self, rewards_PN: ArrayLike) -> Array:
        return np.asarray(as_finite(rewards_PN, "rewards").argmax(-1))


class WorstOfN(Procedure):
    """An attacker keeps the lowest-scored of n answers (r is a safety reward, higher is safer): g(u) = n (1-u)^(n-1)."""

    name = "worst-of-n"

    def density(self, u: ArrayLike) -> Array:
        return self.n * (1 - _quantiles(u)) ** (self.n - 1)

    def cumulative(self, u: ArrayLike) -> Array:
        return np.asarray(1 - (1 - _quantiles(u)) ** self.n)

    def log_pmf(self, log_p: ArrayLike, r: ArrayLike) -> Array:
        return bon_log_pmf(log_p, r, self.n, worst=True)

    def weights(self, draws: int) -> Array:
        return BestOfN(self.n).weights(draws)[::-1].copy()

    def choose(self, rewards_PN: ArrayLike) -> Array:
        return np.asarray(as_finite(rewards_PN, "rewards").argmin(-1))


_PROCEDURES: dict[str, type[Procedure]] = {"identity": Identity, "best-of-n": BestOfN, "worst-of-n": WorstOfN}


def as_procedure(procedure: Procedure | str, n: float | None = None) -> Procedure:
    """A procedure from itself, or from "identity", "best-of-n" or "worst-of-n" (underscores will do) and n."""
    if isinstance(procedure, Procedure):
        if n is not None and n != procedure.n:
            raise InputError(f"n: the procedure has n={procedure.n:g} already; leave n out, got {n}")
        return procedure
    name = str(procedure).replace("_", "-")
    if name not in _PROCEDURES:
        raise UnknownNameError("procedure", str(procedure), _PROCEDURES)
    if name == "identity":
        return Identity()
    if n is None:
        raise InputError(f"n: {name} needs the number of answers that are drawn, as n=4")
    return _PROCEDURES[name](n)


def _quantiles(u: ArrayLike) -> Array:
    values = as_float64(u, "u")
    if ((values < 0) | (values > 1)).any():
        raise InputError(f"u: quantiles lie in [0, 1], got {float(values[(values < 0) | (values > 1)].flat[0])}")
    return values
