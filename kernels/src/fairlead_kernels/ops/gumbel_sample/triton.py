"""gumbel_sample in Triton: one program per row and block gives the block's best token, a second step the row's best.

Scores are float32; two tokens closer than about 1e-5 may fall out differently from the float64 reference.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..prf.triton import token_words
from .reference import BAD_ROW, Drawn, cutoff, noise_state

BLOCK = 2048


@triton.jit
def gumbel_sample_kernel(
    logits_ptr,
    logits_row,
    logits_column,
    state_ptr,
    inverse_ptr,
    least_ptr,
    vocabulary,
    blocks,
    score_ptr,
    id_ptr,
    top_ptr,
    sum_ptr,
    odd_ptr,
    LOGPROB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """state_ptr: int64 [B, 6], the state's four words and both halves of the row's key, each a uint32."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    raw = tl.load(logits_ptr + row * logits_row + columns * logits_column, mask=inside, other=-float("inf"))
    inverse = tl.load(inverse_ptr + row)
    scaled = raw.to(tl.float32) * inverse
    odd = (scaled != scaled) | (scaled == float("inf"))
    least = tl.load(least_ptr + row)
    kept = tl.where(inside & (scaled >= least), scaled, -float("inf"))
    start = row * 6 + tl.zeros([1], tl.int64)
    s0 = tl.load(state_ptr + start).to(tl.uint32)
    s1 = tl.load(state_ptr + start + 1).to(tl.uint32)
    s2 = tl.load(state_ptr + start + 2).to(tl.uint32)
    s3 = tl.load(state_ptr + start + 3).to(tl.uint32)
    key0 = tl.load(state_ptr + start + 4).to(tl.uint32)
    key1 = tl.load(state_ptr + start + 5).to(tl.uint32)
    words = token_words(columns.to(tl.uint32), s0, s1, s2, s3, key0, key1)
    # m * 2^-24 with m = word >> 8 plus one, clipped below one: the float just below it, as the definition rounds.
    m = (words >> 8).to(tl.int32) + 1
    u = m.to(tl.float32) * 5.9604644775390625e-8
    bits = u.to(tl.int32, bitcast=True) - 1
    u = bits.to(tl.float32, bitcast=True)
    noisy = kept - tl.log(-tl.log(u))
    noisy = tl.where(kept == -float("inf"), -float("inf"), noisy)
    best = tl.max(noisy, 0)
    chosen = tl.min(tl.where(noisy == best, columns, 9223372036854775807), 0)
    place = row * blocks + block
    tl.store(score_ptr + place, best)
    tl.store(id_ptr + place, chosen)
    tl.store(odd_ptr + place, tl.max(odd.to(tl.int32), 0))
    if LOGPROB:
        top = tl.max(kept, 0)
        safe = tl.where(top == -float("inf"), 0.0, top)
        tl.store(top_ptr + place, top)
        tl.store(sum_ptr + place, tl.sum(tl.exp(kept - safe), 0))


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
    if batch == 0:
        return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.float32, device=device)
    state, keys_B = noise_state(context_BH, key, seeds, positions)
    state_B6 = torch.stack([*state, keys_B & 0xFFFFFFFF, (keys_B >> 32) & 0xFFFFFFFF], 1).contiguous()
    inverse_B = torch.full((batch,), 1.0 / temperature, device=device)
    if temperature_B is not None:
        inverse_B = temperature_B.float().reciprocal().contiguous()
    if top_k or top_p < 1.0 or min_p > 0.0:
        least_B = cutoff(logits_BV.float() * inverse_B[:, None], top_k, top_p, min_p).contiguous()
    else:
        least_B = torch.full((batch,), -math.inf, device=device)
    blocks = triton.cdiv(vocabulary, BLOCK)

    def table(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((batch, blocks), dtype=dtype, device=device)

    score_BN, id_BN, odd_BN = table(torch.float32), table(torch.int64), table(torch.int32)
    top_BN, sum_BN = (table(torch.float32), table(torch.float32)) if want_logprob else (score_BN, score_BN)
    gumbel_sample_kernel[(batch, blocks)](
        logits_BV, *logits_BV.stride(), state_B6, inverse_B, least_B, vocabulary, blocks, score_BN, id_BN, top_BN, sum_BN,
        odd_BN, LOGPROB=want_logprob, BLOCK=BLOCK,
    )  # fmt: skip
    best_B1 = score_BN.amax(1, keepdim=True)
    ids_B = id_BN.masked_fill(score_BN != best_B1, torch.iinfo(torch.int64).max).amin(1)
    bad_B = (odd_BN.amax(1) > 0) | (best_B1[:, 0] == -math.inf)
    logprob_B = torch.zeros(batch, dtype=torch.float32, device=device)
    ids_B = torch.where(bad_B, BAD_ROW, ids_B)
    if want_logprob:
        total_B = (top_BN + sum_BN.log()).logsumexp(1)
        chosen_B = logits_BV.gather(1, ids_B.clamp(min=0)[:, None])[:, 0].float() * inverse_B
        logprob_B = (chosen_B - total_B).masked_fill(bad_B, 0.0)
    if rows is not None:
        ids_B, logprob_B = ids_B.masked_fill(~rows, -1), logprob_B.masked_fill(~rows, 0.0)
    return ids_B, logprob_B
