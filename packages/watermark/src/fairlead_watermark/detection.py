"""Exact tests of per-row statistics. Rows with nothing scored give p = 1.

Binomial: c green of n, p = P(Bin(n, gamma) >= c) = I_gamma(c, n - c + 1). Gamma: S = sum of n Exp(1) scores,
p = Q(n, S). scipy is imported when the first p-value is asked for.
"""

from __future__ import annotations

import numpy as np
import torch


def binomial_p_value(
    green_B: torch.Tensor, scored_B: torch.Tensor, gamma: float, mid_p: bool = False
) -> torch.Tensor:
    """P(Bin(n, gamma) >= c), float64 [B]; with mid_p half the probability of c itself is taken off."""
    from scipy.special import betainc, gammaln

    c, n = _numpy(green_B), _numpy(scored_B)
    p = np.where(c > 0, betainc(np.maximum(c, 1), n - c + 1, gamma), 1.0)
    if mid_p:
        log_pmf = gammaln(n + 1) - gammaln(c + 1) - gammaln(n - c + 1) + c * np.log(gamma) + (n - c) * np.log1p(-gamma)
        p = p - 0.5 * np.exp(log_pmf)
    return torch.from_numpy(np.where(n > 0, p, 1.0)).to(green_B.device)


def gamma_p_value(score_B: torch.Tensor, scored_B: torch.Tensor) -> torch.Tensor:
    """P(Gamma(n, 1) >= S), float64 [B]."""
    from scipy.special import gammaincc

    s, n = _numpy(score_B), _numpy(scored_B)
    return torch.from_numpy(np.where(n > 0, gammaincc(np.maximum(n, 1), s), 1.0)).to(score_B.device)


def binomial_z(green_B: torch.Tensor, scored_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """(c - gamma n) / sqrt(gamma (1 - gamma) n), float64 [B]; 0 where nothing was scored."""
    n = scored_B.double()
    return torch.where(n > 0, (green_B - gamma * n) / (gamma * (1 - gamma) * n.clamp(min=1)).sqrt(), 0.0)


def gamma_z(score_B: torch.Tensor, scored_B: torch.Tensor) -> torch.Tensor:
    """(S - n) / sqrt(n), float64 [B]; 0 where nothing was scored."""
    n = scored_B.double()
    return torch.where(n > 0, (score_B - n) / n.clamp(min=1).sqrt(), 0.0)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
