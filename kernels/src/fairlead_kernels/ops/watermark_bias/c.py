"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from ..prf.keys import unsigned_key
from .reference import threshold

SCHEME_CODES = {"lefthash": 0, "minhash": 1, "selfhash": 2}


def watermark_bias(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    key: int,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    out_BV = torch.empty(logits_BV.shape, dtype=logits_BV.dtype)
    watermark_bias_out(logits_BV, context_BH, key, gamma, delta, scheme, rows, out_BV)
    return out_BV


def watermark_bias_(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    key: int,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
) -> None:
    watermark_bias_out(logits_BV, context_BH, key, gamma, delta, scheme, rows, logits_BV)


def watermark_bias_out(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    key: int,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    batch, vocabulary = logits_BV.shape
    if batch == 0 or vocabulary == 0:
        return
    if logits_BV.stride(1) != 1 and vocabulary > 1:  # the kernel walks columns one by one
        logits_BV = logits_BV.contiguous()
    if out.stride(1) != 1 and vocabulary > 1:
        out.copy_(watermark_bias(logits_BV, context_BH, key, gamma, delta, scheme, rows))
        return
    native.for_rows(
        native.function("fl_watermark_bias", "qqpqipqqqQIfipqpqq"),
        batch,
        vocabulary,
        logits_BV.data_ptr(),
        logits_BV.stride(0),
        native.DTYPE_CODES[logits_BV.dtype],
        context_BH.data_ptr(),
        *context_BH.stride(),
        context_BH.shape[1],
        unsigned_key(key),
        threshold(gamma),
        delta,
        SCHEME_CODES[scheme],
        None if rows is None else rows.data_ptr(),
        0 if rows is None else rows.stride(0),
        out.data_ptr(),
        out.stride(0),
        vocabulary,
    )
