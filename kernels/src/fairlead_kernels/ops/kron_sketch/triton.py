"""kron_sketch in Triton: one program per sample and tile of its sketch; the signs are made again in registers."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..prf.triton import key_halves, philox4x32, token_words

TOKENS, WIDTH, TILE = 32, 32, 32


@triton.jit
def sign_state(layer, side, block, key0, key1):
    """The philox state of the context (layer, side, block)."""
    s0 = tl.full([1], 0x574D4358, tl.uint32) ^ layer
    s1 = tl.full([1], 3, tl.uint32) ^ side
    s2 = block
    s3 = tl.full([1], 0xFFFFFFFC, tl.uint32)
    return philox4x32(s0, s1, s2, s3, key0, key1)


@triton.jit
def projected(
    x_ptr, x_row, x_column, width, at, there, s0, s1, s2, s3, key0, key1,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[TOKENS, TILE]: rows times the transposed signs of one block of 32 projections."""
    out = tl.zeros([TOKENS, TILE], tl.float32)
    shifts = tl.arange(0, TILE).to(tl.uint32)
    for start in range(0, width, WIDTH):
        columns = start + tl.arange(0, WIDTH).to(tl.int64)
        words = token_words(columns.to(tl.uint32), s0, s1, s2, s3, key0, key1)
        bits = (words[:, None] >> shifts[None, :]) & 1
        sign = bits.to(tl.float32) * 2.0 - 1.0
        pointers = x_ptr + at[:, None] * x_row + columns[None, :] * x_column
        x = tl.load(pointers, mask=there[:, None] & (columns < width)[None, :], other=0.0)
        out = tl.dot(x.to(tl.float32), sign, out, input_precision="ieee")
    return out


@triton.jit(do_not_specialize=["key_low", "key_high", "layer"])
def kron_sketch_kernel(
    a_ptr, a_row, a_column, g_ptr, g_row, g_column, mask_ptr, mask_stride, offsets_ptr, offsets_stride, inputs, outputs,
    rows, columns, key_low, key_high, layer, scale, out_ptr,
    MASKED: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    zero = tl.full([1], 0, tl.int64)
    key0 = (zero + key_low).to(tl.uint32)
    key1 = (zero + key_high).to(tl.uint32)
    layer_word = (zero + layer).to(tl.uint32)
    row_block = (zero + tl.program_id(1)).to(tl.uint32)
    column_block = (zero + tl.program_id(2)).to(tl.uint32)
    output_side = tl.full([1], 0, tl.uint32)
    input_side = tl.full([1], 1, tl.uint32)
    g0, g1, g2, g3 = sign_state(layer_word, output_side, row_block, key0, key1)
    a0, a1, a2, a3 = sign_state(layer_word, input_side, column_block, key0, key1)
    begin = tl.load(offsets_ptr + sample * offsets_stride)
    end = tl.load(offsets_ptr + (sample + 1) * offsets_stride)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(begin, end, TOKENS):
        at = first + tl.arange(0, TOKENS).to(tl.int64)
        there = at < end
        if MASKED:
            there = there & (tl.load(mask_ptr + at * mask_stride, mask=there, other=0) != 0)
        small_g = projected(g_ptr, g_row, g_column, outputs, at, there, g0, g1, g2, g3, key0, key1, TOKENS, WIDTH, TILE)
        small_a = projected(a_ptr, a_row, a_column, inputs, at, there, a0, a1, a2, a3, key0, key1, TOKENS, WIDTH, TILE)
        total = tl.dot(tl.trans(small_g), small_a, total, input_precision="ieee")
    r = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    c = tl.program_id(2).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    place = sample * rows * columns + r[:, None] * columns + c[None, :]
    tl.store(out_ptr + place, total * scale, mask=inside)


def kron_sketch(
    activations_NI: torch.Tensor,
    grads_NO: torch.Tensor,
    offsets: torch.Tensor,
    mask_N: torch.Tensor | None,
    seed: int,
    layer: int,
    rows: int,
    columns: int,
    single: bool,
) -> torch.Tensor:
    samples = offsets.shape[0] - 1
    out_BK = torch.empty((samples, rows * columns), dtype=torch.float32, device=activations_NI.device)
    if samples:
        flags_N = offsets if mask_N is None else mask_N.view(torch.uint8)
        kron_sketch_kernel[(samples, triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
            activations_NI, *activations_NI.stride(), grads_NO, *grads_NO.stride(), flags_N, flags_N.stride(0), offsets,
            offsets.stride(0), activations_NI.shape[1], grads_NO.shape[1], rows, columns, *key_halves(seed), layer,
            (rows * columns) ** -0.5, out_BK,
            MASKED=mask_N is not None, TOKENS=TOKENS, WIDTH=WIDTH, TILE=TILE,
        )  # fmt: skip
    return out_BK
