"""Ghost norms in Triton: one program per sample and block of its tokens, the symmetric half only; partial sums are added
by torch in one order. The direct path, and samples whose terms cancel, are torch's products."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..fisher_diag_linear.triton import precision
from . import tiled

TOKENS, WIDTH = 32, 64


@triton.jit
def token_products(
    x_ptr, x_row, x_column, width, first, first_there, second, second_there,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The inner products of two blocks of rows."""
    products = tl.zeros([TOKENS, TOKENS], tl.float32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH).to(tl.int64)
        inside = columns < width
        x = tl.load(
            x_ptr + first[:, None] * x_row + columns[None, :] * x_column,
            mask=first_there[:, None] & inside[None, :],
            other=0.0,
        )
        y = tl.load(
            x_ptr + second[None, :] * x_row + columns[:, None] * x_column,
            mask=second_there[None, :] & inside[:, None],
            other=0.0,
        )
        products = tl.dot(x.to(tl.float32), y.to(tl.float32), products, input_precision=PRECISION)
    return products


@triton.jit
def ghost_norm_kernel(
    a_ptr, a_row, a_column, g_ptr, g_row, g_column, mask_ptr, mask_stride, offsets_ptr, offsets_stride, inputs, outputs,
    blocks, square_ptr, size_ptr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    begin = tl.load(offsets_ptr + sample * offsets_stride)
    end = tl.load(offsets_ptr + (sample + 1) * offsets_stride)
    lanes = tl.arange(0, TOKENS).to(tl.int64)
    first = begin + block * TOKENS + lanes
    first_there = first < end
    if MASKED:
        first_there = first_there & (tl.load(mask_ptr + first * mask_stride, mask=first_there, other=0) != 0)
    square = 0.0
    size = 0.0
    last = tl.minimum(begin + (block + 1) * TOKENS, end)
    for start in range(begin, last, TOKENS):
        second = start + lanes
        there = second < end
        if MASKED:
            there = there & (tl.load(mask_ptr + second * mask_stride, mask=there, other=0) != 0)
        terms = token_products(
            g_ptr, g_row, g_column, outputs, first, first_there, second, there, PRECISION, TOKENS, WIDTH
        ) * token_products(a_ptr, a_row, a_column, inputs, first, first_there, second, there, PRECISION, TOKENS, WIDTH)
        times = tl.where(start == begin + block * TOKENS, 1.0, 2.0)
        square += times * tl.sum(tl.sum(terms, 1), 0)
        size += times * tl.sum(tl.sum(tl.abs(terms), 1), 0)
    tl.store(square_ptr + sample * blocks + block, square)
    tl.store(size_ptr + sample * blocks + block, size)


def grad_square_norm_linear(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    method: str,
    single: bool,
) -> torch.Tensor:
    if (single and method != "direct") or activations_NI.shape[0] == 0:
        return tiled.grad_square_norm_linear(activations_NI, grads_NO, offsets, mask_N, method, single)
    lengths_B = offsets.diff()
    cheap = tiled.ghost_is_cheaper(int(lengths_B.max()), activations_NI.shape[1], grads_NO.shape[1])
    if method == "direct" or (method == "auto" and not cheap):
        return tiled.grad_square_norm_linear(activations_NI, grads_NO, offsets, mask_N, method, False)
    blocks, samples = triton.cdiv(int(lengths_B.max()), TOKENS), offsets.shape[0] - 1
    sums = torch.empty((2, samples, blocks), dtype=torch.float32, device=activations_NI.device)
    flags_N = offsets if mask_N is None else mask_N.view(torch.uint8)
    ghost_norm_kernel[(samples, blocks)](
        activations_NI, *activations_NI.stride(), grads_NO, *grads_NO.stride(), flags_N, flags_N.stride(0), offsets,
        offsets.stride(0), activations_NI.shape[1], grads_NO.shape[1], blocks, sums[0], sums[1],
        MASKED=mask_N is not None, PRECISION=precision(activations_NI.dtype), TOKENS=TOKENS, WIDTH=WIDTH,
    )  # fmt: skip
    square_B, size_B = sums.sum(2)
    for sample in (square_B < tiled.CANCELLED * size_B).nonzero()[:, 0].tolist():
        part = slice(int(offsets[sample]), int(offsets[sample + 1]))
        edges = offsets.new_tensor([0, part.stop - part.start])
        kept = None if mask_N is None else mask_N[part]
        square_B[sample : sample + 1] = tiled.grad_square_norm_linear(
            activations_NI[part], grads_NO[part], edges, kept, "direct", False
        )
    return square_B.clamp(min=0.0)
