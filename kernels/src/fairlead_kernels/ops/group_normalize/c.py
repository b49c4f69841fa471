"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from .reference import batch_deviation, result_dtype

CODES = {"grpo": 0, "dr-grpo": 1, "batch": 2, "rloo": 3, "quantile": 4, "midrank": 5}


def group_normalize(rewards_N: torch.Tensor, offsets: torch.Tensor, kind: str, eps: float) -> torch.Tensor:
    groups, out_N = offsets.shape[0] - 1, torch.empty(rewards_N.shape, dtype=result_dtype(rewards_N))
    offsets = offsets.contiguous()
    deviation = float(batch_deviation(rewards_N)) if kind == "batch" else 0.0
    native.for_rows(
        native.function("fl_group_normalize", "qqpqipiddp"), groups, len(rewards_N) // max(1, groups),
        rewards_N.data_ptr(), rewards_N.stride(0), native.DTYPE_CODES[rewards_N.dtype], offsets.data_ptr(),
        CODES[kind], eps, deviation, out_N.data_ptr(),
    )  # fmt: skip
    return out_N
