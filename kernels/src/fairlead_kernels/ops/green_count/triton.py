"""green_count in Triton: green bits and fingerprints in one kernel, dedup by two sorts on the device."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..prf.triton import key_halves, philox4x32, scramble
from ..watermark_bias.reference import threshold
from ..watermark_bias.triton import MIX32, SCHEME_CODES
from .reference import Counts, columns, extend, scorable, tally

BLOCK = 1024


@triton.jit
def window_word(tokens_ptr, offsets, inside, LEFT: tl.constexpr, LANE: tl.constexpr):
    """Token LANE of a block of four, or its padding when fewer than LANE + 1 are LEFT."""
    if LANE < LEFT:
        word = tl.load(tokens_ptr + offsets + LANE, mask=inside, other=0).to(tl.uint32)
    else:
        word = tl.full(offsets.shape, 0xFFFFFFFF - LANE, tl.uint32)
    return word


@triton.jit
def window_states(tokens_ptr, offsets, inside, key0, key1, WIDTH: tl.constexpr):
    """First two words of the states of the windows of WIDTH tokens that start at offsets."""
    s0 = tl.full(offsets.shape, MIX32, tl.uint32)
    s1 = tl.full(offsets.shape, WIDTH, tl.uint32)
    s2 = tl.full(offsets.shape, 0, tl.uint32)
    s3 = tl.full(offsets.shape, 0, tl.uint32)
    if WIDTH == 0:
        s0, s1, s2, s3 = philox4x32(s0, s1, s2, s3, key0, key1)
    for block in tl.static_range((WIDTH + 3) // 4):
        s0 = s0 ^ window_word(tokens_ptr, offsets + block * 4, inside, WIDTH - block * 4, 0)
        s1 = s1 ^ window_word(tokens_ptr, offsets + block * 4, inside, WIDTH - block * 4, 1)
        s2 = s2 ^ window_word(tokens_ptr, offsets + block * 4, inside, WIDTH - block * 4, 2)
        s3 = s3 ^ window_word(tokens_ptr, offsets + block * 4, inside, WIDTH - block * 4, 3)
        s0, s1, s2, s3 = philox4x32(s0, s1, s2, s3, key0 ^ tl.full([1], block * 4, tl.uint32), key1)
    return s0, s1


@triton.jit(do_not_specialize=["length", "tokens", "key_low", "key_high", "limit"])
def green_count_kernel(
    tokens_ptr,
    length,
    tokens,
    key_low,
    key_high,
    limit,
    green_ptr,
    print_ptr,
    SCHEME: tl.constexpr,
    BY_CONTEXT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tokens_ptr: int64 rows of `length` = WIDTH + tokens, contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < tokens
    key0 = (tl.zeros([1], tl.int64) + key_low).to(tl.uint32)
    key1 = (tl.zeros([1], tl.int64) + key_high).to(tl.uint32)
    bound = (tl.zeros([1], tl.int64) + limit).to(tl.uint32)
    start = row * length + columns
    token = tl.load(tokens_ptr + start + WIDTH, mask=inside, other=0).to(tl.uint32)
    if SCHEME == 0:
        a, b = window_states(tokens_ptr, start, inside, key0, key1, WIDTH)
        word = scramble(scramble(token ^ a) + b)
    else:
        e0, e1 = window_states(tokens_ptr, start, inside, key0, key1, 0)
        if SCHEME == 1:
            best = tl.load(tokens_ptr + start, mask=inside, other=0).to(tl.uint32)
            at = start
            smallest = scramble(scramble(best ^ e0) + e1)
            for i in tl.static_range(1, WIDTH):
                other = tl.load(tokens_ptr + start + i, mask=inside, other=0).to(tl.uint32)
                value = scramble(scramble(other ^ e0) + e1)
                at = tl.where(value < smallest, start + i, at)
                smallest = tl.where(value < smallest, value, smallest)
            a, b = window_states(tokens_ptr, at, inside, key0, key1, 1)
            word = scramble(scramble(token ^ a) + b)
        else:
            smallest = scramble(scramble(token ^ e0) + e1)
            for i in tl.static_range(WIDTH):
                c, d = window_states(tokens_ptr, start + i, inside, key0, key1, 1)
                value = scramble(scramble(token ^ c) + d)
                smallest = tl.where(value < smallest, value, smallest)
            word = scramble(scramble(smallest ^ e0) + e1)
            if BY_CONTEXT:
                a, b = window_states(tokens_ptr, start, inside, key0, key1, WIDTH)
    if SCHEME == 2 and not BY_CONTEXT:
        prints = smallest.to(tl.int64)
    else:
        prints = (a.to(tl.int64) << 32) | b.to(tl.int64)
        if not BY_CONTEXT:
            prints += token.to(tl.int64) * -7046029254386353131
    tl.store(green_ptr + row * tokens + columns, (word < bound).to(tl.int8), mask=inside)
    tl.store(print_ptr + row * tokens + columns, prints, mask=inside)


def green_count(
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor | None,
    context_BH: torch.Tensor | None,
    key: int,
    gamma: float,
    context_width: int,
    scheme: str,
    dedup: str,
    pad_left: bool,
) -> Counts:
    batch, tokens = ids_BT.shape
    width = columns(context_width, scheme)
    extended = extend(ids_BT, context_BH, width)
    valid_BT = scorable(extended, lengths_B, width, tokens, pad_left)
    if ids_BT.numel() == 0:
        return tally(valid_BT, None, valid_BT)
    green_BT = torch.empty((batch, tokens), dtype=torch.int8, device=ids_BT.device)
    prints_BT = torch.empty((batch, tokens), dtype=torch.int64, device=ids_BT.device)
    green_count_kernel[(batch, triton.cdiv(tokens, BLOCK))](
        extended,
        extended.shape[1],
        tokens,
        *key_halves(key),
        threshold(gamma),
        green_BT,
        prints_BT,
        SCHEME=SCHEME_CODES[scheme],
        BY_CONTEXT=dedup == "context",
        WIDTH=width,
        BLOCK=BLOCK,
    )
    return tally(green_BT, None if dedup == "none" else prints_BT, valid_BT)
