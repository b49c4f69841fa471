"""Integrals over [0, 1] of functions that may be steep or singular at the ends: Gauss-Legendre panels.

The panels halve towards 0 and 1 (to 2^-44) and are 1/32 wide between, with 16 nodes each. The running integral uses the
antiderivative of each panel's interpolating polynomial, so distribution functions are as accurate as integrals.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ._inputs import Array

_NODES = 16


@dataclass(frozen=True)
class Rule:
    """`u` nodes in (0, 1) ascending, `weights` that sum to 1: float64 [Q]; panels of `_NODES` nodes."""

    u: Array
    weights: Array
    widths: Array
    running: Array

    def integral(self, values: Array) -> float:
        """Integral of a function given at the nodes."""
        return float(self.weights @ values)

    def cumulative(self, values: Array) -> Array:
        """Integral from 0 to each node: float64 [Q]."""
        panels = values.reshape(-1, _NODES)
        whole = (self.weights * values).reshape(-1, _NODES).sum(-1)
        before = np.concatenate([[0.0], np.cumsum(whole)[:-1]])
        return np.asarray((before[:, None] + self.widths[:, None] * (panels @ self.running.T)).ravel())


@functools.cache
def rule() -> Rule:
    """The rule; made once."""
    legendre = np.polynomial.legendre
    x, w = legendre.leggauss(_NODES)
    steps = 2.0 ** -np.arange(44, 5, -1)
    edges = np.unique(np.concatenate([[0.0], steps, np.arange(1, 32) / 32, 1 - steps, [1.0]]))
    widths = np.diff(edges)
    u = (edges[:-1, None] + widths[:, None] * (x + 1) / 2).ravel()
    # coefficients of the interpolant, integrated from -1 to each node
    to_coefficients = np.linalg.inv(legendre.legvander(x, _NODES - 1))
    antiderivatives = np.stack([legendre.legval(x, legendre.legint(column, lbnd=-1)) for column in np.eye(_NODES)], 1)
    return Rule(u, (widths[:, None] * w / 2).ravel(), widths, antiderivatives @ to_coefficients / 2)
