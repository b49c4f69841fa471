"""gumbel_sample in Triton: a program per row and block finds the block's best token, a program per row the best of those.

Scores are float32 and relative to the block's largest logit, so that their size costs no digits; two tokens closer than
about 1e-5 may still fall out differently from the float64 reference. Cut-offs come from a bitwise search over the order of
floats: the exact k-th largest logit, or the last one of the nucleus, without a sort and without a probability stored.
"""

# mypy: disable-error-code="import-untyped, import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..prf.triton import context_state, key_halves, philox4x32
from .reference import Drawn

BLOCK = 2048
CUTOFF_BLOCK = 4096


@triton.jit
def block_words(block, s0, s1, s2, s3, key0, key1, BLOCK: tl.constexpr):
    """The words of tokens block * BLOCK ..., one Philox call for four of them."""
    quads = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quads ^ quads
    o0, o1, o2, o3 = philox4x32(
        quads, zero ^ s0, zero ^ s1, zero ^ s2, zero ^ s3 ^ key0, zero ^ key1 ^ tl.full([1], 0x574D544B, tl.uint32)
    )
    return tl.interleave(tl.interleave(o0, o2), tl.interleave(o1, o3))


@triton.jit
def uniform_of(words):
    """((word >> 8) + 1) / (2^24 + 1) rounded once: the float just below ((word >> 8) + 1) / 2^24."""
    above = ((words >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-8
    return (above.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def block_kernel(
    logits_ptr,
    logits_row,
    logits_column,
    temperature_ptr,
    temperature,
    context_ptr,
    context_row,
    context_column,
    seeds_ptr,
    positions_ptr,
    key_low,
    key_high,
    least_ptr,
    rows_ptr,
    vocabulary,
    blocks,
    score_ptr,
    id_ptr,
    top_ptr,
    sum_ptr,
    SEEDED: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    CUT: tl.constexpr,
    MASKED: tl.constexpr,
    LOGPROB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per block: its largest kept logit (+inf: the block holds NaN or +inf), the best score (l - that) / T + g, the
    lowest id that has it, and the sum of exp((l - that) / T)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    place = row * blocks + block
    if MASKED:  # noqa: SIM102 (decided when compiled, then per row)
        if tl.load(rows_ptr + row) == 0:
            return
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    raw = tl.load(logits_ptr + row * logits_row + columns * logits_column, mask=inside, other=-float("inf"))
    raw = raw.to(tl.float32)
    odd = tl.max(((raw != raw) | (raw == float("inf"))).to(tl.int32), 0)
    if CUT:
        raw = tl.where(raw >= tl.load(least_ptr + row), raw, -float("inf"))
    top = tl.max(raw, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    if PER_ROW:
        scaled = (raw - base) / tl.load(temperature_ptr + row)
    else:
        scaled = (raw - base) / (tl.full([1], 0.0, tl.float32) + temperature)
    if SEEDED:
        seed = tl.load(seeds_ptr + row + tl.zeros([1], tl.int64))
        position = tl.load(positions_ptr + row + tl.zeros([1], tl.int64))
        key0 = seed.to(tl.uint32)
        key1 = (seed >> 32).to(tl.uint32)
        s0 = tl.full([1], 0x464C5331, tl.uint32)
        s0, s1, s2, s3 = philox4x32(s0, position.to(tl.uint32), (position >> 32).to(tl.uint32), s0 ^ s0, key0, key1)
    else:
        key0 = (tl.full([1], 0, tl.int64) + key_low).to(tl.uint32)
        key1 = (tl.full([1], 0, tl.int64) + key_high).to(tl.uint32)
        s0, s1, s2, s3 = context_state(context_ptr, row * context_row, context_column, key0, key1, 0x574D4358, WIDTH)
    noise = -tl.log(-tl.log(uniform_of(block_words(block, s0, s1, s2, s3, key0, key1, BLOCK))))
    noisy = tl.where(raw == -float("inf"), -float("inf"), scaled + noise)
    best = tl.max(noisy, 0)
    tl.store(score_ptr + place, best)
    tl.store(id_ptr + place, tl.min(tl.where(noisy == best, columns, 9223372036854775807), 0))
    tl.store(top_ptr + place, tl.where(odd > 0, float("inf"), top))
    if LOGPROB:
        tl.store(sum_ptr + place, tl.sum(tl.exp(scaled), 0))


@triton.jit
def row_kernel(
    logits_ptr,
    logits_row,
    logits_column,
    temperature_ptr,
    temperature,
    rows_ptr,
    blocks,
    score_ptr,
    id_ptr,
    top_ptr,
    sum_ptr,
    ids_ptr,
    logprobs_ptr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    LOGPROB: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The best of a row's blocks: -1 for a row that is not drawn, -2 for one with NaN, +inf or nothing above -inf."""
    row = tl.program_id(0).to(tl.int64)
    if MASKED:  # noqa: SIM102 (decided when compiled, then per row)
        if tl.load(rows_ptr + row) == 0:
            tl.store(ids_ptr + row, -1)
            tl.store(logprobs_ptr + row, 0.0)
            return
    at = tl.arange(0, SPAN)
    inside = at < blocks
    place = row * blocks + at
    tops = tl.load(top_ptr + place, mask=inside, other=-float("inf"))
    top = tl.max(tops, 0)
    good = tl.abs(top) < float("inf")
    base = tl.where(good, top, 0.0)
    if PER_ROW:
        scale = tl.load(temperature_ptr + row)
    else:
        scale = tl.full([1], 0.0, tl.float32) + temperature
    below = (tops - base) / scale
    scores = tl.load(score_ptr + place, mask=inside, other=-float("inf")) + below
    scores = tl.where(below == -float("inf"), -float("inf"), scores)
    ids = tl.load(id_ptr + place, mask=inside, other=9223372036854775807)
    chosen = tl.min(tl.where(scores == tl.max(scores, 0), ids, 9223372036854775807), 0)
    chosen = tl.where(good, chosen, 0)
    tl.store(ids_ptr + row, tl.where(good, chosen, -2))
    logprob = tl.zeros([1], tl.float32)
    if LOGPROB:
        sums = tl.load(sum_ptr + place, mask=inside, other=0.0)
        total = tl.sum(tl.where(below == -float("inf"), 0.0, sums * tl.exp(below)), 0)
        raw = tl.load(logits_ptr + row * logits_row + chosen * logits_column).to(tl.float32)
        logprob = tl.where(good, (raw - base) / scale - tl.log(total), 0.0) + logprob
    tl.store(logprobs_ptr + row + tl.zeros([1], tl.int64), logprob)


@triton.jit
def order_of(x):
    """Integers in [0, 2^32) in the order of float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def value_of(order):
    """The inverse of `order_of`."""
    bits = (order - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["top_k"])
def cutoff_kernel(
    logits_ptr,
    logits_row,
    logits_column,
    temperature_ptr,
    temperature,
    least_ptr,
    vocabulary,
    top_k,
    top_p,
    log_min_p,
    PER_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest logit of a row that truncation keeps. Each bit of its order costs one pass over the row."""
    row = tl.program_id(0).to(tl.int64)
    line = logits_ptr + row * logits_row
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    if PER_ROW:
        scale = tl.load(temperature_ptr + row)
    else:
        scale = tl.full([], 0.0, tl.float32) + temperature
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        inside = first + lanes < vocabulary
        tops = tl.maximum(
            tops, tl.load(line + (first + lanes) * logits_column, mask=inside, other=-float("inf")).to(tl.float32)
        )
    top = tl.max(tops, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    least = tl.full([], 0, tl.int64)
    if TOP_K:
        for step in range(32):
            tried = least | (tl.full([], 1, tl.int64) << (31 - step))
            counts = tl.zeros([BLOCK], tl.int64)
            for first in range(0, vocabulary, BLOCK):
                inside = first + lanes < vocabulary
                raw = tl.load(line + (first + lanes) * logits_column, mask=inside, other=-float("inf")).to(tl.float32)
                counts += (inside & (order_of(raw) >= tried)).to(tl.int64)
            least = tl.where(tl.sum(counts, 0) >= top_k, tried, least)
    if TOP_P:
        floor = least
        total = tl.full([], 0.0, tl.float32)
        least = tl.full([], 0, tl.int64)
        for step in range(33):  # the first pass, at no bit, gives the whole mass
            tried = least
            if step > 0:
                tried = least | (tl.full([], 1, tl.int64) << (32 - step))
            masses = tl.zeros([BLOCK], tl.float32)
            for first in range(0, vocabulary, BLOCK):
                inside = first + lanes < vocabulary
                raw = tl.load(line + (first + lanes) * logits_column, mask=inside, other=-float("inf")).to(tl.float32)
                order = order_of(raw)
                masses += tl.where((order >= tried) & (order >= floor), tl.exp((raw - top) / scale), 0.0)
            mass = tl.sum(masses, 0)
            if step == 0:
                total = mass
            least = tl.where(mass >= top_p * total, tried, least)
        least = tl.maximum(least, floor)
    value = tl.where(least == 0, -float("inf"), value_of(least))
    if MIN_P:
        value = tl.maximum(value, top + log_min_p * scale)
    tl.store(least_ptr + row, value)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def uniform_kernel(
    context_ptr,
    context_row,
    context_column,
    key_low,
    key_high,
    vocabulary,
    out_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    key0 = (tl.full([1], 0, tl.int64) + key_low).to(tl.uint32)
    key1 = (tl.full([1], 0, tl.int64) + key_high).to(tl.uint32)
    s0, s1, s2, s3 = context_state(context_ptr, row * context_row, context_column, key0, key1, 0x574D4358, WIDTH)
    u = uniform_of(block_words(block, s0, s1, s2, s3, key0, key1, BLOCK))
    tl.store(out_ptr + row * vocabulary + columns, u, mask=columns < vocabulary)


def gumbel_sample(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor | None,
    key: int,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
    temperature: float,
    temperature_B: torch.Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
    rows: torch.Tensor | None,
    want_logprob: bool,
) -> Drawn:
    batch, vocabulary = logits_BV.shape
    device = logits_BV.device
    ids_B = torch.empty(batch, dtype=torch.int64, device=device)
    logprob_B = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return ids_B, logprob_B
    seeds, positions, temperature_B, rows = (
        None if value is None else value.contiguous() for value in (seeds, positions, temperature_B, rows)
    )
    logits = (logits_BV, *logits_BV.stride())
    heat = (temperature_B, float(temperature))
    per_row, masked = temperature_B is not None, rows is not None
    least_B = None
    cuts = {"TOP_K": 0 < top_k < vocabulary, "TOP_P": top_p < 1.0, "MIN_P": min_p > 0.0}
    if any(cuts.values()):
        least_B = torch.empty(batch, dtype=torch.float32, device=device)
        log_min_p = math.log(min_p) if min_p > 0.0 else 0.0
        cutoff_kernel[(batch,)](
            *logits, *heat, least_B, vocabulary, min(top_k, vocabulary), top_p, log_min_p, PER_ROW=per_row, **cuts,
            BLOCK=CUTOFF_BLOCK, num_warps=16,
        )  # fmt: skip
    blocks = triton.cdiv(vocabulary, BLOCK)
    tables = [torch.empty((batch, blocks), dtype=dtype, device=device) for dtype in (torch.float32, torch.int64)]
    tables += [torch.empty((batch, blocks), dtype=torch.float32, device=device) for _ in range(2)]
    context = (None, 0, 0) if context_BH is None else (context_BH, *context_BH.stride())
    block_kernel[(batch, blocks)](
        *logits, *heat, *context, seeds, positions, *key_halves(key), least_B, rows, vocabulary, blocks, *tables,
        SEEDED=context_BH is None, WIDTH=0 if context_BH is None else context_BH.shape[1], PER_ROW=per_row,
        CUT=least_B is not None, MASKED=masked, LOGPROB=want_logprob, BLOCK=BLOCK,
    )  # fmt: skip
    row_kernel[(batch,)](
        *logits, *heat, rows, blocks, *tables, ids_B, logprob_B, PER_ROW=per_row, MASKED=masked, LOGPROB=want_logprob,
        SPAN=triton.next_power_of_2(blocks),
    )  # fmt: skip
    return ids_B, logprob_B


def gumbel_uniform(context_BH: torch.Tensor, key: int, vocabulary: int) -> torch.Tensor:
    out_BV = torch.empty((context_BH.shape[0], vocabulary), dtype=torch.float32, device=context_BH.device)
    if out_BV.numel() == 0:
        return out_BV
    uniform_kernel[(context_BH.shape[0], triton.cdiv(vocabulary, BLOCK))](
        context_BH, *context_BH.stride(), *key_halves(key), vocabulary, out_BV, WIDTH=context_BH.shape[1], BLOCK=BLOCK
    )
    return out_BV
