"""Calls kernel.c."""

from __future__ import annotations

import torch

from ... import native
from .reference import Number


def pack_rows(
    values_BTD: torch.Tensor, offsets: torch.Tensor, total: int, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, width, depth = values_BTD.shape
    out_ND = torch.empty((total, depth), dtype=values_BTD.dtype)
    position_N = torch.empty(total, dtype=torch.int64)
    offsets = offsets.contiguous()
    native.for_rows(
        native.function("fl_pack_rows", "qqpqqqqqqpipp"), batch, width * depth, values_BTD.data_ptr(),
        *values_BTD.stride(), width, depth, values_BTD.element_size(), offsets.data_ptr(), int(left),
        out_ND.data_ptr(), position_N.data_ptr(),
    )  # fmt: skip
    return out_ND, position_N


def unpack_rows(rows_ND: torch.Tensor, offsets: torch.Tensor, width: int, fill: Number, left: bool) -> torch.Tensor:
    batch, depth = offsets.shape[0] - 1, rows_ND.shape[1]
    out_BTD = torch.empty((batch, width, depth), dtype=rows_ND.dtype)
    offsets, fill_1 = offsets.contiguous(), torch.full((1,), fill, dtype=rows_ND.dtype)
    native.for_rows(
        native.function("fl_unpack_rows", "qqpqqqqqpipp"), batch, width * depth, rows_ND.data_ptr(), *rows_ND.stride(),
        width, depth, rows_ND.element_size(), offsets.data_ptr(), int(left), fill_1.data_ptr(), out_BTD.data_ptr(),
    )  # fmt: skip
    return out_BTD
