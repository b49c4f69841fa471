"""prf in Triton, and the device functions (philox4x32, context_state, scramble) on which other kernels stand.

Words are uint32 throughout; the 64-bit key comes as two int64 halves that each hold a uint32 (a kernel argument of
type uint64 would be specialised by value)."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .keys import unsigned_key

BLOCK = 1024


@triton.jit
def philox4x32(c0, c1, c2, c3, key0, key1):
    """Philox-4x32-10 on uint32 blocks."""
    for _ in tl.static_range(10):
        left_high = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        left_low = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        right_high = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        right_low = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = right_high ^ c1 ^ key0, right_low, left_high ^ c3 ^ key1, left_low
        key0 = key0 + tl.full(key0.shape, 0x9E3779B9, tl.uint32)
        key1 = key1 + tl.full(key1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def context_word(context_ptr, offset, column_stride, WIDTH: tl.constexpr, POSITION: tl.constexpr, LANE: tl.constexpr):
    """Token at POSITION as a uint32 block of one, or the padding of LANE beyond the end."""
    if POSITION < WIDTH:
        word = tl.load(context_ptr + offset + (tl.zeros([1], tl.int64) + POSITION) * column_stride).to(tl.uint32)
    else:
        word = tl.full([1], 0xFFFFFFFF - LANE, tl.uint32)
    return word


@triton.jit
def context_state(context_ptr, offset, column_stride, key0, key1, DOMAIN: tl.constexpr, WIDTH: tl.constexpr):
    """The state of the context at context_ptr + offset (int64 ids), as four uint32 blocks of one element.

    key0, key1: uint32 blocks of one element."""
    s0 = tl.full([1], DOMAIN, tl.uint32)
    s1 = tl.full([1], WIDTH, tl.uint32)
    s2 = tl.full([1], 0, tl.uint32)
    s3 = tl.full([1], 0, tl.uint32)
    if WIDTH == 0:
        s0, s1, s2, s3 = philox4x32(s0, s1, s2, s3, key0, key1)
    for block in tl.static_range((WIDTH + 3) // 4):
        s0 = s0 ^ context_word(context_ptr, offset, column_stride, WIDTH, block * 4, 0)
        s1 = s1 ^ context_word(context_ptr, offset, column_stride, WIDTH, block * 4 + 1, 1)
        s2 = s2 ^ context_word(context_ptr, offset, column_stride, WIDTH, block * 4 + 2, 2)
        s3 = s3 ^ context_word(context_ptr, offset, column_stride, WIDTH, block * 4 + 3, 3)
        s0, s1, s2, s3 = philox4x32(s0, s1, s2, s3, key0 ^ tl.full([1], block * 4, tl.uint32), key1)
    return s0, s1, s2, s3


@triton.jit
def scramble(h):
    """The 32-bit finaliser M of mix32 on a uint32 block."""
    h = h ^ (h >> 16)
    h = h * tl.full(h.shape, 0x7FEB352D, tl.uint32)
    h = h ^ (h >> 15)
    h = h * tl.full(h.shape, 0x846CA68B, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def token_words(tokens, s0, s1, s2, s3, key0, key1):
    """The philox word of each token of a uint32 block under a state of one-element blocks."""
    zero = tokens ^ tokens
    out0, out1, out2, out3 = philox4x32(
        tokens >> 2,
        zero ^ s0,
        zero ^ s1,
        zero ^ s2,
        zero ^ s3 ^ key0,
        zero ^ key1 ^ tl.full([1], 0x574D544B, tl.uint32),
    )
    lane = tokens & 3
    return tl.where(lane < 2, tl.where(lane == 0, out0, out1), tl.where(lane == 2, out2, out3))


@triton.jit(do_not_specialize=["count", "key_low", "key_high"])
def prf_kernel(
    context_ptr,
    context_row,
    context_column,
    tokens_ptr,
    token_row,
    token_column,
    count,
    key_low,
    key_high,
    out_ptr,
    PHILOX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < count
    key0 = tl.full([1], 0, tl.int64) + key_low
    key1 = tl.full([1], 0, tl.int64) + key_high
    key0 = key0.to(tl.uint32)
    key1 = key1.to(tl.uint32)
    tokens = tl.load(tokens_ptr + row * token_row + columns * token_column, mask=inside, other=0).to(tl.uint32)
    if PHILOX:
        s0, s1, s2, s3 = context_state(context_ptr, row * context_row, context_column, key0, key1, 0x574D4358, WIDTH)
        words = token_words(tokens, s0, s1, s2, s3, key0, key1)
    else:
        s0, s1, s2, s3 = context_state(context_ptr, row * context_row, context_column, key0, key1, 0x464C4731, WIDTH)
        words = scramble(scramble(tokens ^ s0) + s1)
    tl.store(out_ptr + row * count + columns, words.to(tl.int64), mask=inside)


def key_halves(key: int) -> tuple[int, int]:
    """A signed key as its low and high 32 bits."""
    return unsigned_key(key) & 0xFFFFFFFF, unsigned_key(key) >> 32


def prf(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, function: str) -> torch.Tensor:
    rows, count = tokens_BN.shape
    out_BN = torch.empty((rows, count), dtype=torch.int64, device=tokens_BN.device)
    if out_BN.numel() == 0:
        return out_BN
    prf_kernel[(rows, triton.cdiv(count, BLOCK))](
        context_BH,
        *context_BH.stride(),
        tokens_BN,
        *tokens_BN.stride(),
        count,
        *key_halves(key),
        out_BN,
        PHILOX=function == "philox",
        WIDTH=context_BH.shape[1],
        BLOCK=BLOCK,
    )
    return out_BN
