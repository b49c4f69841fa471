"""Transformations of the calibrated reward C in [0, 1]: which one is optimal depends on the inference-time procedure.

Balashankar et al., "InfAlign" (arXiv 2412.19792). Identity is optimal for a single sample; log leads to best-of-n
distillation; exp(t) is near the optimum of best-of-n (t > 0) and of worst-of-n (t < 0); `optimal` is the fixed point.
An affine change of a transform only rescales beta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fairlead.errors import InputError
from fairlead.rewards import calibration

from ._inputs import Array
from .procedures import Procedure, as_procedure
from .quadrature import rule
from .tilts import solve_alpha, tilt


class Transform(calibration.Transform):
    """A map of calibrated rewards, as `fairlead.rewards` puts them on; here also the optimal one."""

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


TransformLike = calibration.Transform | Callable[[Array], Any] | str


def as_transform(transform: TransformLike) -> calibration.Transform:
    """A Transform from itself, a function of C, or "identity", "log", "exp:T" and "power:N", as "exp:10"."""
    found = calibration.as_transform(transform)
    if isinstance(found, calibration.Transform):
        return found
    return Transform(getattr(found, "__name__", "function"), found, monotone=False)


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
