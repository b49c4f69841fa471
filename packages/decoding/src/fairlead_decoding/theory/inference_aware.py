"""Win rates after an inference-time procedure: what a transform of the calibrated reward buys, in closed form.

Balashankar et al., "InfAlign: Inference-aware language model alignment" (arXiv 2412.19792). For rewards without atoms
the optimum of E Phi(C) - beta KL has the quantile density f(u) ~ exp(Phi(u) / beta), whatever the reward and the model:
KL = int f log f, and the win rate after a procedure g is int f g(F) G. On outcomes that can be listed the exact
distributions take the place of g; from samples, order statistics do. Training on such rewards is the training package's.

Shape suffixes: P prompts, K draws per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fairlead.errors import InputError
from fairlead.rewards.calibration import Transform

from ._inputs import Array, as_finite, logsumexp
from .procedures import Identity, Procedure, as_procedure
from .quadrature import rule
from .ranks import win_rate
from .tilts import solve_alpha, tilt
from .transforms import TransformLike, as_transform


@dataclass(frozen=True)
class FrontierPoint:
    """The optimum for one transform and one budget. beta: of E Phi(C) - beta KL. kl: nats. win_rate: after the
    procedure that was asked for. standard: of a single sample. `under` gives any other procedure's.
    `quantiles`, `density`, `cdf`: nodes u in (0, 1), f(u) and F(u), float64 [Q]."""

    transform: Transform
    procedure: Procedure
    beta: float
    kl: float
    win_rate: float
    standard: float
    quantiles: Array
    density: Array
    cdf: Array

    def under(self, procedure: Procedure | str, n: float | None = None) -> float:
        """Win rate against the reference model when both are served with `procedure`."""
        return quantile_win_rate(self.density, as_procedure(procedure, n))


def frontier(
    transform: TransformLike, procedure: Procedure | str = "identity", n: float | None = None, *,
    beta: float | None = None, kl: float | None = None,
) -> FrontierPoint:  # fmt: skip
    """Closed-form divergence and win rates of the optimum of E Phi(C) - beta KL, by quadrature.

    transform: a Transform, "identity", "log", "exp:10", or a function of C. procedure, n: "identity", "best-of-n",
    "worst-of-n", or a Procedure. Give either beta > 0 or kl >= 0 (nats), which solves for beta (inf at kl = 0).
    InputError: both or neither, beta <= 0, or a divergence that this transform cannot reach.
    """
    phi, found = as_transform(transform), as_procedure(procedure, n)
    if (beta is None) == (kl is None):
        raise InputError(f"frontier: give either beta or kl, got beta={beta}, kl={kl}")
    if beta is not None and not beta > 0:
        raise InputError(f"beta: must be above 0, got {beta}")
    r = rule()
    log_w = np.log(r.weights)
    log_w = log_w - logsumexp(log_w)
    values = as_finite(phi(r.u), f"transform {phi.name}")
    if kl is not None:
        alpha = solve_alpha(log_w, values, kl)
        if not np.isfinite(alpha):
            raise InputError(f"kl: {phi.name} cannot spend {kl} nats; a smaller budget or a steeper transform is needed")
        beta = float(np.inf if alpha == 0 else 1 / alpha)
    assert beta is not None
    log_f = tilt(log_w, values, 1 / beta) - log_w
    density = np.exp(log_f)
    return FrontierPoint(
        phi, found, float(beta), r.integral(density * log_f), quantile_win_rate(density, found),
        quantile_win_rate(density, Identity()), r.u, density, r.cumulative(density),
    )  # fmt: skip


def quantile_win_rate(density: Array, procedure: Procedure) -> float:
    """int f(u) g(F(u)) G(u) du for a quantile density f at the nodes of `quadrature.rule`."""
    r = rule()
    cdf = np.clip(r.cumulative(density), 0.0, 1.0)
    return r.integral(density * procedure.density(cdf) * procedure.cumulative(r.u))


def exact_win_rate(
    log_pi: ArrayLike, log_p: ArrayLike, r: ArrayLike, procedure: Procedure | str = "identity", n: float | None = None
) -> Array:
    """Win rate of pi against the reference p when both are served with `procedure`, on outcomes that can be listed.

    log_pi, log_p, r: float64 [M] or [B, M]. Returns float64 [] or [B]. Ties count half.
    """
    found = as_procedure(procedure, n)
    return win_rate(found.log_pmf(log_pi, r), found.log_pmf(log_p, r), r)


@dataclass(frozen=True)
class WinRate:
    """Mean over prompts, its standard error (NaN for one prompt), and the estimate of every prompt, float64 [P]."""

    mean: float
    standard_error: float
    per_prompt: Array


def inference_win_rate(
    policy_rewards: ArrayLike, reference_rewards: ArrayLike, procedure: Procedure | str, n: int | None = None
) -> WinRate:
    """Unbiased win rate after the procedure from independent draws, without drawing groups of n.

    policy_rewards [P, K], reference_rewards [P, K'] (or [K], [K'] for one prompt), K, K' >= n. Sum over both pools' order
    statistics of w_i v_j [1{a_i > b_j} + 1{a_i = b_j} / 2], the mean over all pairs of n-subsets.
    """
    found = as_procedure(procedure, n)
    policy, reference = (np.atleast_2d(as_finite(v, name)) for v, name in ((policy_rewards, "policy_rewards"), (reference_rewards, "reference_rewards")))
    if policy.ndim != 2 or policy.shape[0] != reference.shape[0]:
        raise InputError(f"rewards: must be [P, K] and [P, K'] of the same prompts, got {list(policy.shape)} and {list(reference.shape)}")
    ours, theirs = found.weights(policy.shape[1]), found.weights(reference.shape[1])
    below = np.concatenate([[0.0], np.cumsum(theirs)])
    rates = []
    for a, b in zip(np.sort(policy, -1), np.sort(reference, -1), strict=True):
        strictly, upto = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")
        rates.append(float(ours @ (below[strictly] + below[upto]) / 2))
    per_prompt = np.array(rates)
    error = float(per_prompt.std(ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else float("nan")
    return WinRate(float(per_prompt.mean()), error, per_prompt)
