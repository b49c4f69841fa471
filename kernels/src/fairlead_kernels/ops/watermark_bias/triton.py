"""watermark_bias in Triton: one program per row and block of the vocabulary, nothing of length V besides the logits."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..prf.triton import context_state, key_halves, scramble
from .reference import threshold

BLOCK = 4096
SCHEME_CODES = {"lefthash": 0, "minhash": 1, "selfhash": 2}
MIX32 = tl.constexpr(0x464C4731)


@triton.jit
def mix32(tokens, a, b):
    """Words of a uint32 block under the state (a, b), blocks of one element."""
    return scramble(scramble(tokens ^ a) + b)


@triton.jit
def smallest_state(context_ptr, offset, column_stride, key0, key1, WIDTH: tl.constexpr):
    """minhash: the state of the single context token with the smallest word under the empty context."""
    a, b, _, _ = context_state(context_ptr, offset, column_stride, key0, key1, MIX32, 0)
    best = tl.load(context_ptr + offset + tl.zeros([1], tl.int64)).to(tl.uint32)
    smallest = mix32(best, a, b)
    at = tl.zeros([1], tl.int64)
    for i in tl.static_range(1, WIDTH):
        token = tl.load(context_ptr + offset + (tl.zeros([1], tl.int64) + i) * column_stride).to(tl.uint32)
        word = mix32(token, a, b)
        at = tl.where(word < smallest, i, at)
        smallest = tl.where(word < smallest, word, smallest)
    position = tl.sum(at, 0)
    s0, s1, _, _ = context_state(context_ptr, offset + position * column_stride, column_stride, key0, key1, MIX32, 1)
    return s0, s1


@triton.jit
def selfhash_minimum(tokens, context_ptr, offset, column_stride, key0, key1, a, b, WIDTH: tl.constexpr):
    """selfhash: m(v), the smallest word over the empty context (a, b) and each context token alone."""
    smallest = mix32(tokens, a, b)
    for i in tl.static_range(WIDTH):
        at = offset + (tl.zeros([1], tl.int64) + i) * column_stride
        c, d, _, _ = context_state(context_ptr, at, column_stride, key0, key1, MIX32, 1)
        word = mix32(tokens, c, d)
        smallest = tl.where(word < smallest, word, smallest)
    return smallest


@triton.jit(do_not_specialize=["key_low", "key_high", "limit", "rows_stride", "vocabulary"])
def watermark_bias_kernel(
    logits_ptr,
    logits_row,
    logits_column,
    context_ptr,
    context_row,
    context_column,
    key_low,
    key_high,
    limit,
    delta,
    rows_ptr,
    rows_stride,
    out_ptr,
    out_row,
    out_column,
    vocabulary,
    SCHEME: tl.constexpr,
    HARD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    key0 = (tl.zeros([1], tl.int64) + key_low).to(tl.uint32)
    key1 = (tl.zeros([1], tl.int64) + key_high).to(tl.uint32)
    bound = (tl.zeros([1], tl.int64) + limit).to(tl.uint32)
    tokens = columns.to(tl.uint32)
    offset = row * context_row
    if SCHEME == 2:
        a, b, _, _ = context_state(context_ptr, offset, context_column, key0, key1, MIX32, 0)
        word = selfhash_minimum(tokens, context_ptr, offset, context_column, key0, key1, a, b, WIDTH)
        word = mix32(word, a, b)
    elif SCHEME == 1:
        a, b = smallest_state(context_ptr, offset, context_column, key0, key1, WIDTH)
        word = mix32(tokens, a, b)
    else:
        a, b, _, _ = context_state(context_ptr, offset, context_column, key0, key1, MIX32, WIDTH)
        word = mix32(tokens, a, b)
    green = word < bound
    logits = tl.load(logits_ptr + row * logits_row + columns * logits_column, mask=inside, other=0).to(tl.float32)
    if HARD:
        biased = tl.where(green | (logits != logits), logits, float("-inf"))
    else:
        biased = tl.where(green, logits + (tl.zeros([1], tl.float32) + delta).to(tl.float32), logits)
    if rows_ptr is not None:
        biased = tl.where(tl.load(rows_ptr + row * rows_stride) != 0, biased, logits)
    tl.store(out_ptr + row * out_row + columns * out_column, biased.to(out_ptr.dtype.element_ty), mask=inside)


def watermark_bias(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    key: int,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    out_BV = torch.empty(logits_BV.shape, dtype=logits_BV.dtype, device=logits_BV.device)
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
    hard = math.isinf(delta)
    watermark_bias_kernel[(batch, triton.cdiv(vocabulary, BLOCK))](
        logits_BV,
        *logits_BV.stride(),
        context_BH,
        *context_BH.stride(),
        *key_halves(key),
        threshold(gamma),
        0.0 if hard else delta,
        None if rows is None else rows.view(torch.uint8),
        0 if rows is None else rows.stride(0),
        out,
        *out.stride(),
        vocabulary,
        SCHEME=SCHEME_CODES[scheme],
        HARD=hard,
        WIDTH=context_BH.shape[1],
        BLOCK=BLOCK,
    )
