"""The tiles of tiles.py with kernel.c as their steps; the matrix products stay torch's."""

from __future__ import annotations

import functools

import torch

from ... import native
from . import tiles


def forward_step(
    tile_NV: torch.Tensor,
    local_N: torch.Tensor,
    scale: float,
    top_N: torch.Tensor,
    total_N: torch.Tensor,
    chosen_N: torch.Tensor,
    rescale_N: torch.Tensor | None,
) -> None:
    rows, columns = tile_NV.shape
    native.for_rows(
        native.function("fl_linear_logprob_forward", "qqpqpfpppp"), rows, columns, tile_NV.data_ptr(), columns,
        local_N.data_ptr(), scale, top_N.data_ptr(), total_N.data_ptr(), chosen_N.data_ptr(),
        None if rescale_N is None else rescale_N.data_ptr(),
    )  # fmt: skip


def backward_step(
    tile_NV: torch.Tensor, local_N: torch.Tensor, scale: float, lse_N: torch.Tensor, factor_N: torch.Tensor
) -> None:
    rows, columns = tile_NV.shape
    lse_N, factor_N = lse_N.contiguous(), factor_N.contiguous()
    native.for_rows(
        native.function("fl_linear_logprob_backward", "qqpqpfpp"), rows, columns, tile_NV.data_ptr(), columns,
        local_N.data_ptr(), scale, lse_N.data_ptr(), factor_N.data_ptr(),
    )  # fmt: skip


linear_logprob = functools.partial(tiles.linear_logprob, step=forward_step)
linear_logprob_backward = functools.partial(tiles.linear_logprob_backward, step=backward_step)
