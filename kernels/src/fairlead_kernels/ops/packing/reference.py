"""Packing rows in plain torch: an index per packed row, gathered or scattered."""

from __future__ import annotations

import torch

from ..segment_reduce.reference import segment_of

Number = int | float | bool


def places(offsets: torch.Tensor, total: int, width: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For each packed row: its place in the flattened padded rows, and its position in its sequence."""
    segment_N = segment_of(offsets, total)
    position_N = torch.arange(total, device=offsets.device) - offsets[:-1][segment_N]
    pad_N = (width - offsets.diff())[segment_N] if left else 0
    return segment_N * width + pad_N + position_N, position_N


def pack_rows(
    values_BTD: torch.Tensor, offsets: torch.Tensor, total: int, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, width, depth = values_BTD.shape
    place_N, position_N = places(offsets, total, width, left)
    return values_BTD.reshape(batch * width, depth)[place_N], position_N


def unpack_rows(rows_ND: torch.Tensor, offsets: torch.Tensor, width: int, fill: Number, left: bool) -> torch.Tensor:
    batch, depth = offsets.shape[0] - 1, rows_ND.shape[1]
    place_N, _ = places(offsets, rows_ND.shape[0], width, left)
    out_MD = rows_ND.new_full((batch * width, depth), fill)
    out_MD[place_N] = rows_ND
    return out_MD.view(batch, width, depth)
