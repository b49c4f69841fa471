"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from .reference import Pair


def selective_logprob(logits_NV: torch.Tensor, ids_N: torch.Tensor, temperature: float) -> Pair:
    rows, vocabulary = logits_NV.shape
    logp_N, lse_N = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
    native.for_rows(
        native.function("fl_selective_logprob", "qqpqqiqpqfpp"), rows, vocabulary, logits_NV.data_ptr(),
        *logits_NV.stride(), native.DTYPE_CODES[logits_NV.dtype], vocabulary, ids_N.data_ptr(), ids_N.stride(0),
        1.0 / temperature, logp_N.data_ptr(), lse_N.data_ptr(),
    )  # fmt: skip
    return logp_N, lse_N


def selective_logprob_backward(
    grad_N: torch.Tensor, logits_NV: torch.Tensor, ids_N: torch.Tensor, lse_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    rows, vocabulary = logits_NV.shape
    out_NV = torch.empty((rows, vocabulary), dtype=logits_NV.dtype)
    grad_N, lse_N = grad_N.float(), lse_N.float().contiguous()
    native.for_rows(
        native.function("fl_selective_logprob_backward", "qqpqpqqiqpqpfp"), rows, vocabulary, grad_N.data_ptr(),
        grad_N.stride(0), logits_NV.data_ptr(), *logits_NV.stride(), native.DTYPE_CODES[logits_NV.dtype], vocabulary,
        ids_N.data_ptr(), ids_N.stride(0), lse_N.data_ptr(), 1.0 / temperature, out_NV.data_ptr(),
    )  # fmt: skip
    return out_NV
