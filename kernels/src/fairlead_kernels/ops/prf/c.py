"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from .keys import unsigned_key


def prf(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, function: str) -> torch.Tensor:
    rows, count = tokens_BN.shape
    out_BN = torch.empty((rows, count), dtype=torch.int64)
    native.for_rows(
        native.function("fl_prf", "qqpqqqpqqqQip"),
        rows,
        count * 4,
        context_BH.data_ptr(),
        *context_BH.stride(),
        context_BH.shape[1],
        tokens_BN.data_ptr(),
        *tokens_BN.stride(),
        count,
        unsigned_key(key),
        int(function == "philox"),
        out_BN.data_ptr(),
    )
    return out_BN
