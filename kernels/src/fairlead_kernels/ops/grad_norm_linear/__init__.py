"""Norms of per-sample gradients of a linear layer, and all their inner products, without storing them.

The gradient of sample b's loss in the weight is G_b = sum_t g_bt a_bt^T. `grad_norm_linear` gives ||G_b||_F (differential
privacy's clipping, gradient-based selection; "ghost norm", arXiv 2110.05679), `grad_gram_linear` <G_b, G_c>, a block of
the empirical tangent kernel. The loss is a sum over samples, never a mean.
"""

from __future__ import annotations

import torch

from ... import checks, library
from ..fisher_diag_linear import sample_sums
from ..fisher_diag_linear.layout import rows
from .spec import METHODS, SPECS

library.define(SPECS)
_grad_square_norm_linear = torch.ops.fairlead.grad_square_norm_linear.default
_grad_gram_linear = torch.ops.fairlead.grad_gram_linear.default

__all__ = ["grad_norm_linear", "grad_gram_linear"]


def grad_norm_linear(
    activations_BTI: torch.Tensor,
    output_grads_BTO: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    bias: bool = False,
    method: str = "auto",
) -> torch.Tensor:
    """Frobenius norm of each sample's gradient.

    Shapes, packed layout and errors as of `fisher_diag_linear`. bias: the norm of weight and bias gradients together.
    method: "ghost" (time T^2 (I + O)), "direct" (T I O), or "auto", the cheaper of the two. A ghost norm whose terms all
    but cancel (norm^2 below 1e-3 of the sum of their sizes) is computed again directly, whatever the method.
    Returns float32 [B] (float64 of float64), never below 0. Norms of several layers add as squares. Not differentiable.
    """
    checks.one_of(method, "method", METHODS)
    given = rows(activations_BTI, output_grads_BTO, mask_BT, cu_seqlens)
    square_B: torch.Tensor = _grad_square_norm_linear(
        given.activations, given.grads, given.offsets, given.mask, method, given.single
    )
    if bias:
        square_B = square_B + sample_sums(given).square().sum(1)
    return square_B.sqrt()


def grad_gram_linear(
    activations_BTI: torch.Tensor,
    output_grads_BTO: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    bias: bool = False,
) -> torch.Tensor:
    """Inner products <G_b, G_c> of all pairs of samples' gradients: symmetric [B, B], its diagonal the squared norms.

    Arguments as of `grad_norm_linear`. Memory: [B, B] and a buffer of a few MiB.
    """
    given = rows(activations_BTI, output_grads_BTO, mask_BT, cu_seqlens)
    gram_BB: torch.Tensor = _grad_gram_linear(given.activations, given.grads, given.offsets, given.mask)
    if bias:
        sums_BO = sample_sums(given)
        gram_BB = gram_BB + sums_BO @ sums_BO.T
    return gram_BB
