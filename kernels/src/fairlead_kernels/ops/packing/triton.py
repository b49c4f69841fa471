"""Packing rows in Triton: one program per sequence and block of tokens; positions in the same pass."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import Number

ELEMENTS = 2048  # of a block


@triton.jit
def pack_rows_kernel(
    values_ptr, batch_stride, token_stride, column_stride, width, depth, offsets_ptr, offsets_stride, out_ptr,
    position_ptr, LEFT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.load(offsets_ptr + sequence * offsets_stride)
    count = tl.load(offsets_ptr + (sequence + 1) * offsets_stride) - begin
    source = tokens
    if LEFT:
        source = tokens + (width - count)
    tl.store(position_ptr + begin + tokens, tokens, mask=tokens < count)
    for first in range(0, depth, COLUMNS):
        columns = first + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (tokens < count)[:, None] & (columns < depth)[None, :]
        pointers = values_ptr + sequence * batch_stride + source[:, None] * token_stride
        value = tl.load(pointers + columns[None, :] * column_stride, mask=inside)
        tl.store(out_ptr + (begin + tokens)[:, None] * depth + columns[None, :], value, mask=inside)


@triton.jit
def unpack_rows_kernel(
    rows_ptr, row_stride, column_stride, width, depth, offsets_ptr, offsets_stride, fill_ptr, out_ptr,
    LEFT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.load(offsets_ptr + sequence * offsets_stride)
    count = tl.load(offsets_ptr + (sequence + 1) * offsets_stride) - begin
    source = tokens
    if LEFT:
        source = tokens - (width - count)
    held = (source >= 0) & (source < count)
    fill = tl.load(fill_ptr)
    for first in range(0, depth, COLUMNS):
        columns = first + tl.arange(0, COLUMNS).to(tl.int64)
        room = (tokens < width)[:, None] & (columns < depth)[None, :]
        pointers = rows_ptr + (begin + source)[:, None] * row_stride + columns[None, :] * column_stride
        value = tl.load(pointers, mask=held[:, None] & room)
        value = tl.where(held[:, None], value, fill)
        tl.store(out_ptr + (sequence * width + tokens)[:, None] * depth + columns[None, :], value, mask=room)


def blocks(depth: int) -> dict[str, int]:
    columns = min(256, triton.next_power_of_2(max(1, depth)))
    return {"TOKENS": ELEMENTS // columns, "COLUMNS": columns}


def pack_rows(
    values_BTD: torch.Tensor, offsets: torch.Tensor, total: int, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, width, depth = values_BTD.shape
    out_ND = torch.empty((total, depth), dtype=values_BTD.dtype, device=values_BTD.device)
    position_N = torch.empty(total, dtype=torch.int64, device=values_BTD.device)
    block = blocks(depth)
    if total:
        pack_rows_kernel[(batch, triton.cdiv(width, block["TOKENS"]))](
            values_BTD, *values_BTD.stride(), width, depth, offsets, offsets.stride(0), out_ND, position_N,
            LEFT=left, **block,
        )  # fmt: skip
    return out_ND, position_N


def unpack_rows(rows_ND: torch.Tensor, offsets: torch.Tensor, width: int, fill: Number, left: bool) -> torch.Tensor:
    batch, depth = offsets.shape[0] - 1, rows_ND.shape[1]
    out_BTD = torch.empty((batch, width, depth), dtype=rows_ND.dtype, device=rows_ND.device)
    fill_1 = torch.full((1,), fill, dtype=rows_ND.dtype, device=rows_ND.device)
    block = blocks(depth)
    if out_BTD.numel():
        unpack_rows_kernel[(batch, triton.cdiv(width, block["TOKENS"]))](
            rows_ND, *rows_ND.stride(), width, depth, offsets, offsets.stride(0), fill_1, out_BTD, LEFT=left, **block
        )
    return out_BTD
