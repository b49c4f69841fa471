"""selective_logprob in plain torch."""

from __future__ import annotations

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def selective_logprob(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> Pair:
    """(log-probability, log-sum-exp of logits / temperature), both [N]."""
    scaled_NV = logits_NV.to(accumulator(logits_NV.dtype)) / temperature
    lse_N = scaled_NV.logsumexp(-1)
    return scaled_NV.gather(-1, ids_N[:, None])[:, 0] - lse_N, lse_N


def selective_logprob_backward(
    grad_N: torch.Tensor, logits_NV: torch.Tensor, ids_N: torch.Tensor, lse_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """d logits, in their dtype."""
    wide = accumulator(logits_NV.dtype)
    share_NV = (logits_NV.to(wide) / temperature - lse_N[:, None]).exp()
    scale_N1 = (grad_N / temperature).to(wide)[:, None]
    out_NV = share_NV.mul_(-scale_N1)
    out_NV.scatter_add_(1, ids_N[:, None], scale_N1)
    return out_NV.to(logits_NV.dtype)
