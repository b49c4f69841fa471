"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from .reference import result_dtype

CODES = {"sum": 0, "mean": 1, "max": 2, "argmax": 3, "last": 4, "logsumexp": 5}


def segment_reduce(values_ND: torch.Tensor, offsets: torch.Tensor, op: str) -> torch.Tensor:
    (count, width), segments = values_ND.shape, offsets.shape[0] - 1
    out_SD = torch.empty((segments, width), dtype=result_dtype(values_ND.dtype, op))
    offsets = offsets.contiguous()
    native.for_rows(
        native.function("fl_segment_reduce", "qqpqqiqpip"), segments, count * width // max(1, segments),
        values_ND.data_ptr(), *values_ND.stride(), native.DTYPE_CODES[values_ND.dtype], width, offsets.data_ptr(),
        CODES[op], out_SD.data_ptr(),
    )  # fmt: skip
    return out_SD
