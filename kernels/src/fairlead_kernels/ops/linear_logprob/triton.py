"""The tiles of tiles.py with Triton kernels as their steps: one program per row of a tile, or per piece of a row. The
matrix products are cuBLAS's."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import tiles

BLOCK = 4096


@triton.jit
def tile_forward_kernel(
    tile_ptr, count, local_ptr, scale, top_ptr, total_ptr, chosen_ptr, rescale_ptr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tile_ptr + row * count
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    local = tl.load(local_ptr + row)
    held = (local >= 0) & (local < count)
    picked = tl.load(start + local, mask=held, other=0.0)  # before the row is overwritten
    chosen = tl.where(held, picked, tl.load(chosen_ptr + row))
    before = tl.load(top_ptr + row)
    most = before
    for first in range(0, count, BLOCK):
        at = first + offsets
        values = tl.load(start + at, mask=at < count, other=-float("inf"))
        most = tl.maximum(most, tl.max(values, 0))
    safe = tl.where(most == -float("inf"), 0.0, most)
    shrink = tl.exp((before - safe) * scale)
    total = tl.load(total_ptr + row) * shrink
    for first in range(0, count, BLOCK):
        at = first + offsets
        values = tl.load(start + at, mask=at < count, other=-float("inf"))
        shares = tl.exp((values - safe) * scale)
        total += tl.sum(shares, 0)
        if KEEP:
            tl.store(start + at, shares, mask=at < count)
    tl.store(top_ptr + row, most)
    tl.store(total_ptr + row, total)
    tl.store(chosen_ptr + row, chosen)
    if KEEP:
        tl.store(rescale_ptr + row, shrink)


@triton.jit
def tile_backward_kernel(tile_ptr, count, local_ptr, scale, lse_ptr, factor_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(tile_ptr + row * count + at, mask=at < count, other=-float("inf"))
    hit = tl.where(at == tl.load(local_ptr + row), 1.0, 0.0)
    slope = tl.load(factor_ptr + row) * (hit - tl.exp(values * scale - tl.load(lse_ptr + row)))
    tl.store(tile_ptr + row * count + at, slope, mask=at < count)


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
    tile_forward_kernel[(rows,)](
        tile_NV, columns, local_N, scale, top_N, total_N, chosen_N, rescale_N, KEEP=rescale_N is not None, BLOCK=BLOCK
    )


def backward_step(
    tile_NV: torch.Tensor, local_N: torch.Tensor, scale: float, lse_N: torch.Tensor, factor_N: torch.Tensor
) -> None:
    rows, columns = tile_NV.shape
    tile_backward_kernel[(rows, triton.cdiv(columns, BLOCK))](
        tile_NV, columns, local_N, scale, lse_N.contiguous(), factor_N.contiguous(), BLOCK=BLOCK
    )


linear_logprob = functools.partial(tiles.linear_logprob, step=forward_step)
linear_logprob_backward = functools.partial(tiles.linear_logprob_backward, step=backward_step)
