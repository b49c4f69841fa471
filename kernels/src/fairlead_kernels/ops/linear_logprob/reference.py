"""linear_logprob and its backward in plain torch, with all [N, V] logits at once."""

from __future__ import annotations

import torch

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    wide = accumulator(hidden_ND.dtype)
    logits_NV = hidden_ND.to(wide) @ weight_VD.to(wide).T
    return (logits_NV if bias_V is None else logits_NV + bias_V.to(wide)) / temperature


def linear_logprob(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    unit: bool,
) -> Triple:
    """(log-probability [N], log-sum-exp [N], d logp / d hidden [N, D], which is [0, D] unless `unit`)."""
    logits_NV = scaled_logits(hidden_ND, weight_VD, bias_V, temperature)
    lse_N = logits_NV.logsumexp(-1)
    logp_N = logits_NV.gather(-1, target_N[:, None])[:, 0] - lse_N
    if not unit:
        return logp_N, lse_N, hidden_ND.new_empty((0, hidden_ND.shape[1]))
    wide_VD = weight_VD.to(logits_NV.dtype)
    unit_ND = (wide_VD[target_N] - (logits_NV - lse_N[:, None]).exp() @ wide_VD) / temperature
    return logp_N, lse_N, unit_ND.to(hidden_ND.dtype)


def linear_logprob_backward(
    grad_N: torch.Tensor,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    lse_N: torch.Tensor,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Triple:
    """d hidden, d weight and d bias in the dtypes of theirs; empty where not needed."""
    logits_NV = scaled_logits(hidden_ND, weight_VD, bias_V, temperature)
    factor_N1 = (grad_N / temperature).to(logits_NV.dtype)[:, None]
    slope_NV = -factor_N1 * (logits_NV - lse_N[:, None]).exp()
    slope_NV.scatter_add_(1, target_N[:, None], factor_N1)
    d_hidden, d_weight, d_bias = nothing(hidden_ND, weight_VD, bias_V)
    if need_hidden:
        d_hidden = (slope_NV @ weight_VD.to(slope_NV.dtype)).to(hidden_ND.dtype)
    if need_weight:
        d_weight = (slope_NV.T @ hidden_ND.to(slope_NV.dtype)).to(weight_VD.dtype)
    if need_bias and bias_V is not None:
        d_bias = slope_NV.sum(0).to(bias_V.dtype)
    return d_hidden, d_weight, d_bias


def nothing(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> Triple:
    """Gradients that nobody asked for."""
    none_0D = (0, hidden_ND.shape[1])
    return (
        hidden_ND.new_empty(none_0D),
        weight_VD.new_empty(none_0D),
        (weight_VD if bias_V is None else bias_V).new_empty(0),
    )
