"""fisher_diag_linear as matrix products of torch into one buffer: measured faster than C, and about the cost of one
ordinary gradient. Blocks of outputs keep the buffer small however large the layer."""

from __future__ import annotations

from itertools import pairwise

import torch

from .layout import dense_samples, without_masked

ELEMENTS = 1 << 20  # of the buffer: 4 MiB in float32


def fisher_diag_linear(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    single: bool,
) -> torch.Tensor:
    if single:
        return squares_product(activations_NI, grads_NO, mask_N)
    a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    outputs, inputs = g_NO.shape[1], a_NI.shape[1]
    out_OI = a_NI.new_zeros(outputs, inputs)
    block = max(1, min(outputs, ELEMENTS // max(1, inputs)))
    memory = a_NI.new_empty(block, inputs)
    samples = [(begin, end) for begin, end in pairwise(edges) if end > begin]
    for first in range(0, outputs, block):
        part_OI = out_OI[first : first + block]
        gradient_OI = memory[: len(part_OI)]
        for begin, end in samples:
            torch.mm(g_NO[begin:end, first : first + block].T, a_NI[begin:end], out=gradient_OI)
            part_OI.addcmul_(gradient_OI, gradient_OI)
    return out_OI


def squares_product(activations_NI: torch.Tensor, grads_NO: torch.Tensor, mask_N: torch.Tensor | None) -> torch.Tensor:
    """One row per sample: sum_n (g_n a_n^T)^2 = (g * g)^T (a * a), one product."""
    wide = torch.float64 if activations_NI.dtype == torch.float64 else torch.float32
    a_NI, g_NO = without_masked(activations_NI, mask_N).to(wide), without_masked(grads_NO, mask_N).to(wide)
    return g_NO.square().T @ a_NI.square()
