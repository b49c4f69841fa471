"""Transformations of the calibrated reward C in [0, 1]: which one is optimal depends on the inference-time procedure.

Balashankar et al., "InfAlign" (arXiv 2412.19792). Identity is optimal for a single sample; log leads to best-of-n
distillation; exp(t) is near the optimum of best-of-n (t > 0) and of worst-of-n (t < 0); `optimal` is the fixed point.
An affine change of a transform only rescales beta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError, UnknownNameError

from ._inputs import Array, as_float64
from .procedures import Procedure, as_procedure
from .quadrature import rule
from .tilts import solve_alpha, tilt


@dataclass(frozen=True)
class Transform:
    """A map of calibrated rewards, called on float64 arrays in [0, 1].

    monotone: it is increasing. normalised: it maps 0 to 0 and 1 to 1. InputError for a value outside [0, 1].
    """

    name: str
    function: Callable[[Array], Array]
    monotone: bool = True
    normalised: bool = False

    def __call__(self, c: ArrayLike) -> Array:
        values = as_float64(c, "C")
        if ((values < 0) | (values > 1)).any():
            wrong = float(values[(values < 0) | (values > 1)].flat[0])
            raise InputError(f"C: calibrated rewards lie in [0, 1], got {wrong}")
        return np.asarray(self.function(values), dtype=np.float64)

    @classmethod
    def identity(cls) -> Transform:
        """C itself: optimal for the win rate of a single sample."""
        return cls("identity", lambda c: c, normalised=True)

    @classmethod
    def log(cls) -> Transform:
        """log C, -inf at 0. beta = 1/(n-1) gives the best-of-n distribution."""
        return cls("log", _log)

    @classmethod
    def exp(cls, t: float, normalised: bool = True) -> Transform:
        """(exp(t C) - 1) / (exp(t) - 1), between 0 and 1 for either sign of t, the identity as t -> 0; or, not
        normalised, sign(t) exp(t C), whose beta is larger by |exp(t) - 1|."""
        if not np.isfinite(t) or abs(t) > 700:
            raise InputError(f"t: must be a number of size up to 700, got {t}")
        if not normalised:
            if t == 0:
                raise InputError("t: sign(t) exp(t C) needs t other than 0; use the normalised form or the identity")
            return cls(f"exp {t:g}, raw", lambda c: np.sign(t) * np.exp(t * c))
        return cls(f"exp {t:g}", lambda c: _normalised_exp(t, c), normalised=True)

    @classmethod
    def power(cls, n: float) -> Transform:
        """C^n, n > 0."""
        if not 0 < n < np.inf:
            raise InputError(f"n: must be above 0, got {n}")
        return cls(f"power {n:g}", lambda c: c**n, normalised=True)

    @classmethod
    def optimal(cls, procedure: Procedure | str, n: float | None = None, *, kl: float) -> Transform:
        """The transform whose KL-regularised optimum has the best win rate after the procedure at `kl` nats.

        Fixed point of Phi(u) = -int_u^1 g(F(v)) g(v) dv, F the distribution function of the optimum under Phi: damped
        iteration, beta solved anew in each step.
        """
        found = as_procedure(procedure, n)
        if not 0 < kl < np.inf:
            raise InputError(f"kl: must be above 0 nats, got {kl}")
        u, phi = rule().u, _fixed_point(found, float(kl))
        return cls(f"optimal for {found.name}, n = {found.n:g}", lambda c: np.interp(c, u, phi))


TransformLike = Transform | Callable[[Array], Any] | str


def as_transform(transform: TransformLike) -> Transform:
    """A Transform from itself, a function of C, or "identity", "log", "exp:T" and "power:N", as "exp:10"."""
    if isinstance(transform, Transform):
        return transform
    if callable(transform):
        return Transform(getattr(transform, "__name__", "function"), transform, monotone=False)
    name, _, value = str(transform).partition(":")
    makers: dict[str, Callable[..., Transform]] = {"exp": Transform.exp, "power": Transform.power}
    plain: dict[str, Callable[[], Transform]] = {"identity": Transform.identity, "log": Transform.log}
    if name in plain and not value:
        return plain[name]()
    try:
        if name in makers and value:
            return makers[name](float(value))
    except ValueError as error:
        raise InputError(f"transform {transform!r}: {error}") from None
    raise UnknownNameError("transform", str(transform), [*plain, "exp:10", "exp:-10", "power:4"])


def gradient(procedure: Procedure, cdf: Array) -> Array:
    """dW/df(u) = -int_u^1 g(F(v)) g(v) dv at the nodes of `quadrature.rule`, up to a constant: float64 [Q]."""
    r = rule()
    running = r.cumulative(procedure.density(np.clip(cdf, 0, 1)) * procedure.density(r.u))
    total = r.integral(procedure.density(np.clip(cdf, 0, 1)) * procedure.density(r.u))
    return np.asarray(running - total)


def _fixed_point(procedure: Procedure, kl: float) -> Array:
    r = rule()
    log_w = np.log(r.weights)
    log_f = np.zeros_like(log_w)
    phi = gradient(procedure, r.u)
    for _ in range(500):
        alpha = solve_alpha(log_w, phi, kl)
        if not np.isfinite(alpha):
            raise InputError(f"kl: {kl} nats are more than the quadrature can resolve")
        following = tilt(log_w, phi, alpha) - log_w
        mixed = np.log(0.5 * np.exp(log_f) + 0.5 * np.exp(following))
        phi = gradient(procedure, r.cumulative(np.exp(mixed)))
        if np.abs(np.exp(following) - np.exp(log_f)).max() < 1e-11:
            break
        log_f = mixed
    return phi


def _log(c: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(c))


def _normalised_exp(t: float, c: Array) -> Array:
    if abs(t) < 1e-8:
        return c + t * c * (c - 1) / 2
    if t > 0:  # the form whose exponents are at most 0
        return np.asarray((np.exp(t * (c - 1)) - np.exp(-t)) / -np.expm1(-t))
    return np.asarray(np.expm1(t * c) / np.expm1(t))
