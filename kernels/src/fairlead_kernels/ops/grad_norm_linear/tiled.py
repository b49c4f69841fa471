"""Norms and inner products by the cheaper of two paths, as matrix products of torch.

ghost: ||sum_t g_t a_t^T||^2 = sum_ts (g_t . g_s)(a_t . a_s), from two T x T products, no gradient made.
direct: the gradient in blocks of outputs, squared and summed.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ..fisher_diag_linear.layout import dense_samples, without_masked
from ..segment_reduce.reference import segment_of

ELEMENTS = 1 << 20  # of a buffer: 4 MiB in float32
CANCELLED = 1e-3  # a ghost norm^2 below this share of its terms' sizes has too few digits left: the direct path


def ghost_is_cheaper(tokens: int, inputs: int, outputs: int) -> bool:
    """T^2 (I + O) against T I O multiplications."""
    return tokens * (inputs + outputs) < inputs * outputs


def direct(a_TI: torch.Tensor, g_TO: torch.Tensor) -> torch.Tensor:
    block = max(1, ELEMENTS // max(1, a_TI.shape[1]))
    total = a_TI.new_zeros(())
    for first in range(0, g_TO.shape[1], block):
        total += (g_TO[:, first : first + block].T @ a_TI).square().sum()
    return total


def ghost(a_TI: torch.Tensor, g_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm^2, the sum of its terms' sizes)."""
    terms_TT = (g_TO @ g_TO.T).mul_(a_TI @ a_TI.T)
    return terms_TT.sum(), terms_TT.abs_().sum()


def grad_square_norm_linear(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    method: str,
    single: bool,
) -> torch.Tensor:
    if single and method != "direct":
        return row_square_norms(activations_NI, grads_NO, mask_N)
    a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    out_B = a_NI.new_zeros(len(edges) - 1)
    for sample, (begin, end) in enumerate(pairwise(edges)):
        a_TI, g_TO = a_NI[begin:end], g_NO[begin:end]
        cheap = ghost_is_cheaper(end - begin, a_NI.shape[1], g_NO.shape[1])
        if end == begin:
            continue
        if method == "ghost" or (method == "auto" and cheap):
            square, size = ghost(a_TI, g_TO)
            out_B[sample] = square.clamp(min=0.0)
            if square >= CANCELLED * size:
                continue
        out_B[sample] = direct(a_TI, g_TO)
    return out_B


def row_square_norms(activations_NI: torch.Tensor, grads_NO: torch.Tensor, mask_N: torch.Tensor | None) -> torch.Tensor:
    """One row per sample: ||g a^T||^2 = ||g||^2 ||a||^2."""
    wide = torch.float64 if activations_NI.dtype == torch.float64 else torch.float32
    a_NI, g_NO = without_masked(activations_NI, mask_N).to(wide), without_masked(grads_NO, mask_N).to(wide)
    return a_NI.square().sum(1) * g_NO.square().sum(1)


def grad_gram_linear(
    activations_NI: torch.Tensor, grads_NO: torch.Tensor, offsets: torch.Tensor, mask_N: torch.Tensor | None
) -> torch.Tensor:
    a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    (count, inputs), outputs, samples = a_NI.shape, g_NO.shape[1], len(edges) - 1
    gram_BB = a_NI.new_zeros(samples, samples)
    if count * count * (inputs + outputs) < inputs * outputs * (count + samples * samples):
        sample_N = segment_of(torch.tensor(edges, device=a_NI.device), count)
        block = max(1, ELEMENTS // max(1, count))
        for first in range(0, count, block):
            part = slice(first, first + block)
            terms_RN = (g_NO[part] @ g_NO.T).mul_(a_NI[part] @ a_NI.T)
            row_RB = terms_RN.new_zeros(terms_RN.shape[0], samples).index_add_(1, sample_N, terms_RN)
            gram_BB.index_add_(0, sample_N[part], row_RB)
    else:
        block = max(1, ELEMENTS // max(1, inputs * samples))
        for first in range(0, outputs, block):
            each = [g_NO[begin:end, first : first + block].T @ a_NI[begin:end] for begin, end in pairwise(edges)]
            gradients_BX = torch.stack(each).flatten(1) if each else a_NI.new_zeros(0, 1)
            gram_BB += gradients_BX @ gradients_BX.T
    return (gram_BB + gram_BB.T) / 2
