"""selective_logprob and its backward in Triton: one program per row, the vocabulary in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import Pair

BLOCK = 4096


@triton.jit
def selective_logprob_kernel(
    logits_ptr, logits_row, logits_column, ids_ptr, ids_stride, scale, vocabulary, logp_ptr, lse_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * logits_row
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    top = -float("inf")
    total = 0.0
    for first in range(0, vocabulary, BLOCK):
        columns = first + offsets
        raw = tl.load(start + columns * logits_column, mask=columns < vocabulary, other=-float("inf"))
        values = raw.to(tl.float32) * scale
        most = tl.maximum(top, tl.max(values, 0))
        safe = tl.where(most == -float("inf"), 0.0, most)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(values - safe), 0)
        top = most
    lse = top + tl.log(total)
    chosen = tl.load(start + tl.load(ids_ptr + row * ids_stride) * logits_column).to(tl.float32) * scale
    tl.store(lse_ptr + row, lse)
    tl.store(logp_ptr + row, chosen - lse)


@triton.jit
def selective_logprob_backward_kernel(
    grad_ptr, grad_stride, logits_ptr, logits_row, logits_column, ids_ptr, ids_stride, lse_ptr, scale, vocabulary,
    out_ptr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    raw = tl.load(logits_ptr + row * logits_row + columns * logits_column, mask=inside, other=-float("inf"))
    factor = tl.load(grad_ptr + row * grad_stride).to(tl.float32) * scale
    share = tl.exp(raw.to(tl.float32) * scale - tl.load(lse_ptr + row))
    hit = tl.where(columns == tl.load(ids_ptr + row * ids_stride), 1.0, 0.0)
    tl.store(out_ptr + row * vocabulary + columns, (factor * (hit - share)).to(out_ptr.dtype.element_ty), mask=inside)


def selective_logprob(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> Pair:
    rows, vocabulary = logits_NV.shape
    logp_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    lse_N = torch.empty_like(logp_N)
    if rows:
        selective_logprob_kernel[(rows,)](
            logits_NV, *logits_NV.stride(), ids_N, ids_N.stride(0), 1.0 / temperature, vocabulary, logp_N, lse_N,
            BLOCK=BLOCK,
        )  # fmt: skip
    return logp_N, lse_N


def selective_logprob_backward(
    grad_N: torch.Tensor, logits_NV: torch.Tensor, ids_N: torch.Tensor, lse_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    rows, vocabulary = logits_NV.shape
    out_NV = torch.empty((rows, vocabulary), dtype=logits_NV.dtype, device=logits_NV.device)
    if out_NV.numel():
        selective_logprob_backward_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
            grad_N, grad_N.stride(0), logits_NV, *logits_NV.stride(), ids_N, ids_N.stride(0), lse_N.contiguous(),
            1.0 / temperature, vocabulary, out_NV, BLOCK=BLOCK,
        )  # fmt: skip
    return out_NV
