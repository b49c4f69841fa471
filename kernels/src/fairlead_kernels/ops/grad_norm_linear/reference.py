"""Norms and inner products of per-sample gradients in plain torch: every sample's gradient, made."""

from __future__ import annotations

from itertools import pairwise

import torch

from ..fisher_diag_linear.layout import dense_samples


def grad_square_norm_linear(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    method: str,
    single: bool,
) -> torch.Tensor:
    a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    squares = [(g_NO[begin:end].T @ a_NI[begin:end]).square().sum() for begin, end in pairwise(edges)]
    return torch.stack(squares) if squares else a_NI.new_zeros(0)


def grad_gram_linear(
    activations_NI: torch.Tensor, grads_NO: torch.Tensor, offsets: torch.Tensor, mask_N: torch.Tensor | None
) -> torch.Tensor:
    a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    gradients = [(g_NO[begin:end].T @ a_NI[begin:end]).flatten() for begin, end in pairwise(edges)]
    if not gradients:
        return a_NI.new_zeros(0, 0)
    return torch.stack(gradients) @ torch.stack(gradients).T
