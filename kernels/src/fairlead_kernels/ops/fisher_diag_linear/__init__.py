"""The diagonal of the Fisher information of a linear layer, without any sample's gradient stored.

The gradient of sample b's loss in the weight of y = W x is G_b = sum_t g_bt a_bt^T, with the layer's inputs a and the
gradients g at its outputs. `fisher_diag_linear` gives sum_b G_b * G_b: divide by the number of samples for the Fisher.
With labels from the data it is the empirical Fisher, with labels drawn from the model the true one; the loss is a sum over
samples, never a mean (a mean makes g, hence the result, too small).

`token_fisher_diag_linear` takes every token for a sample: sum_t (g_t a_t^T)^2, a different quantity for sequences.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from ... import library
from ..segment_reduce import segment_reduce
from .layout import Rows, rows, without_masked
from .spec import SPECS

library.define(SPECS)
_fisher_diag_linear = torch.ops.fairlead.fisher_diag_linear.default

__all__ = ["fisher_diag_linear", "token_fisher_diag_linear"]


@overload
def fisher_diag_linear(
    activations_BTI: torch.Tensor,
    output_grads_BTO: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    bias: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def fisher_diag_linear(
    activations_BTI: torch.Tensor,
    output_grads_BTO: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    bias: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def fisher_diag_linear(
    activations_BTI: torch.Tensor,
    output_grads_BTO: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    bias: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sum over samples of the squared gradient of each weight: the sequence Fisher's diagonal times the batch size.

    activations_BTI, output_grads_BTO: floating, of one dtype; mask_BT: bool or 0/1, False = padding, which is not read.
    Packed: [N, I] and [N, O] with cu_seqlens [B + 1] (equal neighbours: an empty sample, which adds 0) and mask [N].
    [B, I] and [B, O] without cu_seqlens: one row per sample, which costs one product: (g * g)^T (a * a).
    Returns float32 (float64 of float64) [O, I]; with bias=True also [O], the sum of (sum_t g_bt)^2. Not differentiable.
    ValueError / TypeError on shapes that do not fit; the values of cu_seqlens are checked on the CPU only.
    """
    given = rows(activations_BTI, output_grads_BTO, mask_BT, cu_seqlens)
    weight_OI: torch.Tensor = _fisher_diag_linear(
        given.activations, given.grads, given.offsets, given.mask, given.single
    )
    return (weight_OI, sample_sums(given).square().sum(0)) if bias else weight_OI


def token_fisher_diag_linear(
    activations_BTI: torch.Tensor, output_grads_BTO: torch.Tensor, mask_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over TOKENS of the squared gradient of each weight, (g * g)^T (a * a): no cross terms within a sequence.

    Shapes as of `fisher_diag_linear`, whose result it is for sequences of one token only. Returns float32 [O, I].
    """
    given = rows(activations_BTI, output_grads_BTO, mask_BT, None)
    each = torch.arange(given.activations.shape[0] + 1, device=given.activations.device)
    out_OI: torch.Tensor = _fisher_diag_linear(given.activations, given.grads, each, given.mask, True)
    return out_OI


def sample_sums(given: Rows) -> torch.Tensor:
    """sum_t g_bt, the gradient of a bias, of each sample: [B, O]."""
    return segment_reduce(without_masked(given.grads, given.mask), given.offsets, "sum")
