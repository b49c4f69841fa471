"""gumbel_score in Triton: words and fingerprints in one kernel; logarithms, dedup and sums on the device in float64."""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..green_count.reference import extend, scorable
from ..green_count.triton import window_word
from ..gumbel_sample.stream import uniforms
from ..prf.triton import key_halves, philox4x32
from .reference import Scores, tally

BLOCK = 1024


@triton.jit
def gumbel_score_kernel(
    tokens_ptr,
    length,
    tokens,
    key_low,
    key_high,
    word_ptr,
    print_ptr,
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
    start = row * length + columns
    token = tl.load(tokens_ptr + start + WIDTH, mask=inside, other=0).to(tl.uint32)
    zero = token ^ token
    s0 = zero + tl.full([1], 0x574D4358, tl.uint32)
    s1 = zero + tl.full([1], WIDTH, tl.uint32)
    s2 = zero
    s3 = zero
    if WIDTH == 0:
        s0, s1, s2, s3 = philox4x32(s0, s1, s2, s3, key0, key1)
    for block in tl.static_range((WIDTH + 3) // 4):
        s0 = s0 ^ window_word(tokens_ptr, start + block * 4, inside, WIDTH - block * 4, 0)
        s1 = s1 ^ window_word(tokens_ptr, start + block * 4, inside, WIDTH - block * 4, 1)
        s2 = s2 ^ window_word(tokens_ptr, start + block * 4, inside, WIDTH - block * 4, 2)
        s3 = s3 ^ window_word(tokens_ptr, start + block * 4, inside, WIDTH - block * 4, 3)
        s0, s1, s2, s3 = philox4x32(s0, s1, s2, s3, key0 ^ tl.full([1], block * 4, tl.uint32), key1)
    out0, out1, out2, out3 = philox4x32(
        token >> 2, s0, s1, s2, s3 ^ key0, zero ^ key1 ^ tl.full([1], 0x574D544B, tl.uint32)
    )
    lane = token & 3
    words = tl.where(lane < 2, tl.where(lane == 0, out0, out1), tl.where(lane == 2, out2, out3))
    prints = (s0.to(tl.int64) << 32) | s1.to(tl.int64)
    if not BY_CONTEXT:
        prints += token.to(tl.int64) * -7046029254386353131
    tl.store(word_ptr + row * tokens + columns, words.to(tl.int64), mask=inside)
    tl.store(print_ptr + row * tokens + columns, prints, mask=inside)


def gumbel_score(
    ids_BT: torch.Tensor,
    lengths_B: torch.Tensor | None,
    context_BH: torch.Tensor | None,
    key: int,
    context_width: int,
    dedup: str,
    pad_left: bool,
) -> Scores:
    batch, tokens = ids_BT.shape
    extended = extend(ids_BT, context_BH, context_width)
    valid_BT = scorable(extended, lengths_B, context_width, tokens, pad_left)
    if ids_BT.numel() == 0:
        return tally(valid_BT.double(), None, valid_BT)
    words_BT = torch.empty((batch, tokens), dtype=torch.int64, device=ids_BT.device)
    prints_BT = torch.empty((batch, tokens), dtype=torch.int64, device=ids_BT.device)
    gumbel_score_kernel[(batch, triton.cdiv(tokens, BLOCK))](
        extended, extended.shape[1], tokens, *key_halves(key), words_BT, prints_BT, BY_CONTEXT=dedup == "context",
        WIDTH=context_width, BLOCK=BLOCK,
    )  # fmt: skip
    scores_BT = -torch.log1p(-uniforms(words_BT).double())
    return tally(scores_BT, None if dedup == "none" else prints_BT, valid_BT)
