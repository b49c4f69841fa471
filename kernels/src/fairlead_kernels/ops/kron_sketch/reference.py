"""kron_sketch in plain torch. The projections' signs are bits of the keyed function `prf`: equal on every device."""

from __future__ import annotations

from itertools import pairwise

import torch

from ..fisher_diag_linear.layout import dense_samples, without_masked

OUTPUT_SIDE, INPUT_SIDE = 0, 1


def signs(count: int, width: int, seed: int, layer: int, side: int, like: torch.Tensor) -> torch.Tensor:
    """A [count, width] matrix of +-1: entry (r, c) is bit r % 32 of philox(seed, (layer, side, r // 32), c); 1 is +."""
    blocks, device = (count + 31) // 32, like.device
    context_RH = torch.tensor([[layer, side, block] for block in range(blocks)], dtype=torch.int64, device=device)
    columns_RN = torch.arange(width, device=device).expand(blocks, width)
    words_RN = torch.ops.fairlead.prf.default(context_RH.reshape(blocks, 3), columns_RN, seed, "philox")
    bits = (words_RN[:, None, :] >> torch.arange(32, device=device)[None, :, None]) & 1
    return (bits.reshape(blocks * 32, width)[:count] * 2 - 1).to(like.dtype)


def kron_sketch(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    seed: int,
    layer: int,
    rows: int,
    columns: int,
    single: bool,
) -> torch.Tensor:
    scale = (rows * columns) ** -0.5
    if single:
        wide = torch.float64 if activations_NI.dtype == torch.float64 else torch.float32
        a_NI, g_NO = without_masked(activations_NI, mask_N).to(wide), without_masked(grads_NO, mask_N).to(wide)
        edges: list[int] = []
    else:
        a_NI, g_NO, edges = dense_samples(activations_NI, grads_NO, offsets, mask_N)
    small_NR = g_NO @ signs(rows, g_NO.shape[1], seed, layer, OUTPUT_SIDE, g_NO).T
    small_NC = a_NI @ signs(columns, a_NI.shape[1], seed, layer, INPUT_SIDE, a_NI).T
    if single:
        return (small_NR[:, :, None] * small_NC[:, None, :]).flatten(1) * scale
    out_BK = a_NI.new_zeros(len(edges) - 1, rows * columns)
    for sample, (begin, end) in enumerate(pairwise(edges)):
        torch.mm(small_NR[begin:end].T, small_NC[begin:end], out=out_BK[sample].view(rows, columns))
    return out_BK.mul_(scale)
