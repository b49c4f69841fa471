"""fisher_diag_linear in plain torch: the gradient of each sample, squared."""

from __future__ import annotations

from itertools import pairwise

import torch

from .layout import dense_samples


def fisher_diag_linear(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    single: bool,
) -> torch.Tensor:
    a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    out_OI = a_NI.new_zeros(g_NO.shape[1], a_NI.shape[1])
    for begin, end in pairwise(edges):
        out_OI += (g_NO[begin:end].T @ a_NI[begin:end]).square()
    return out_OI
