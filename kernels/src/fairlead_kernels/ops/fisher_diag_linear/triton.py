"""fisher_diag_linear in Triton: one program owns a tile of the result and goes through all samples, so that the sums
have one order and no sample's gradient is stored."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiled import squares_product

BLOCK, TOKENS = 64, 32


def precision(dtype: torch.dtype) -> str:
    """Every 16-bit float is a tf32 number: products on tensor cores, sums in float32, nothing lost."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def sq_grad_accum_kernel(
    a_ptr, a_row, a_column, g_ptr, g_row, g_column, mask_ptr, mask_stride, offsets_ptr, offsets_stride, samples,
    inputs, outputs, out_ptr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, TOKENS).to(tl.int64)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    begin = tl.load(offsets_ptr)
    for sample in range(0, samples):
        end = tl.load(offsets_ptr + (sample + 1) * offsets_stride)
        gradient = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in range(begin, end, TOKENS):
            at = first + lanes
            there = at < end
            if MASKED:
                there = there & (tl.load(mask_ptr + at * mask_stride, mask=there, other=0) != 0)
            g_pointers = g_ptr + at[None, :] * g_row + rows[:, None] * g_column
            a_pointers = a_ptr + at[:, None] * a_row + columns[None, :] * a_column
            g = tl.load(g_pointers, mask=there[None, :] & (rows < outputs)[:, None], other=0.0).to(tl.float32)
            a = tl.load(a_pointers, mask=there[:, None] & (columns < inputs)[None, :], other=0.0).to(tl.float32)
            gradient = tl.dot(g, a, gradient, input_precision=PRECISION)
        total += gradient * gradient
        begin = end
    inside = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    tl.store(out_ptr + rows[:, None] * inputs + columns[None, :], total, mask=inside)


def fisher_diag_linear(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    single: bool,
) -> torch.Tensor:
    if single:
        return squares_product(activations_NI, grads_NO, mask_N)
    inputs, outputs = activations_NI.shape[1], grads_NO.shape[1]
    out_OI = torch.empty((outputs, inputs), dtype=torch.float32, device=activations_NI.device)
    if out_OI.numel():
        flags_N = offsets if mask_N is None else mask_N.view(torch.uint8)
        sq_grad_accum_kernel[(triton.cdiv(outputs, BLOCK), triton.cdiv(inputs, BLOCK))](
            activations_NI, *activations_NI.stride(), grads_NO, *grads_NO.stride(), flags_N, flags_N.stride(0),
            offsets, offsets.stride(0), offsets.shape[0] - 1, inputs, outputs, out_OI,
            MASKED=mask_N is not None, PRECISION=precision(activations_NI.dtype), BLOCK=BLOCK, TOKENS=TOKENS,
        )  # fmt: skip
    return out_OI
