"""gumbel_sample in plain torch, in float64, and the pieces that the Triton launch shares: states and cut-offs."""

from __future__ import annotations

import math

import torch

from ..prf.keys import unsigned_key
from ..prf.reference import MASK, TOKEN_DOMAIN, Words, context_state, philox4x32

SEED_DOMAIN = 0x464C5331
BAD_ROW = -2
Drawn = tuple[torch.Tensor, torch.Tensor]


def seed_state(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> Words:
    """The state of (seed, position): Philox of (domain, position) under the seed as key."""
    zero = torch.zeros_like(seeds_B)
    counter = (zero + SEED_DOMAIN, positions_B & MASK, (positions_B >> 32) & MASK, zero)
    return philox4x32(counter, seeds_B & MASK, (seeds_B >> 32) & MASK)


def noise_state(
    context_BH: torch.Tensor | None, key: int, seeds: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[Words, torch.Tensor]:
    """State words [B] and the 64-bit key [B] (bits of an int64) of every row's noise."""
    if context_BH is not None:
        state = context_state(context_BH, key, "philox")
        return state, torch.full_like(state[0], _as_signed(key))
    if seeds is None or positions is None:
        raise ValueError("gumbel_sample: seeds and positions are needed without a context")
    return seed_state(seeds, positions), seeds


def _as_signed(key: int) -> int:
    key = unsigned_key(key)
    return key - (1 << 64) if key >> 63 else key


def uniforms(words: torch.Tensor) -> torch.Tensor:
    """u in (0, 1), float32: ((word >> 8) + 1) / (2^24 + 1) in float64, rounded once."""
    return (((words >> 8) + 1).double() / ((1 << 24) + 1)).float()


def gumbel_noise(words: torch.Tensor) -> torch.Tensor:
    """g = -ln(-ln u) in float64."""
    return -(-uniforms(words).double().log()).log()


def cutoff(
    scaled_BV: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """The smallest logit over temperature that truncation keeps, [B]; -inf where everything stays."""
    least_B = torch.full_like(scaled_BV[:, 0], -math.inf)
    if top_k and top_k < scaled_BV.shape[1]:
        least_B = scaled_BV.topk(top_k, 1).values[:, -1]
    if top_p < 1.0:
        kept_BV = scaled_BV.masked_fill(scaled_BV < least_B[:, None], -math.inf)
        sorted_BV = kept_BV.sort(1, descending=True).values
        mass_BV = sorted_BV.softmax(1).cumsum(1)
        last_B = (mass_BV < top_p).sum(1).clamp(max=scaled_BV.shape[1] - 1)
        least_B = torch.maximum(least_B, sorted_BV.gather(1, last_B[:, None])[:, 0])
    if min_p > 0.0:
        least_B = torch.maximum(least_B, scaled_BV.amax(1) + math.log(min_p))
    return least_B


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
    if batch == 0:
        return logits_BV.new_empty((0,), dtype=torch.int64), logits_BV.new_empty((0,), dtype=torch.float32)
    scale = temperature if temperature_B is None else temperature_B.double()[:, None]
    scaled_BV = logits_BV.double() / scale
    bad_B = scaled_BV.isnan().any(1) | (scaled_BV == math.inf).any(1) | (scaled_BV == -math.inf).all(1)
    scaled_BV = scaled_BV.masked_fill(bad_B[:, None], 0.0)
    state, keys_B = noise_state(context_BH, key, seeds, positions)
    tokens_BV = torch.arange(vocabulary, device=logits_BV.device).expand(batch, vocabulary)
    words_BV = philox_words_per_row(state, tokens_BV, keys_B)
    kept_BV = scaled_BV.masked_fill(scaled_BV < cutoff(scaled_BV, top_k, top_p, min_p)[:, None], -math.inf)
    ids_B = (kept_BV + gumbel_noise(words_BV)).argmax(1)
    logprob_B = torch.zeros(batch, dtype=torch.float32, device=logits_BV.device)
    if want_logprob:
        chosen_B = kept_BV.gather(1, ids_B[:, None])[:, 0]
        logprob_B = (chosen_B - kept_BV.logsumexp(1)).float()
    ids_B = ids_B.masked_fill(bad_B, BAD_ROW)
    logprob_B = logprob_B.masked_fill(bad_B, 0.0)
    if rows is not None:
        ids_B, logprob_B = ids_B.masked_fill(~rows, -1), logprob_B.masked_fill(~rows, 0.0)
    return ids_B, logprob_B


def philox_words_per_row(state: Words, tokens_BV: torch.Tensor, keys_B: torch.Tensor) -> torch.Tensor:
    """`philox_words` with a key per row, int64 [B, V]."""
    s0, s1, s2, s3 = (word[:, None].expand_as(tokens_BV) for word in state)
    low, high = (keys_B & MASK)[:, None], ((keys_B >> 32) & MASK)[:, None]
    out = philox4x32((tokens_BV >> 2, s0, s1, s2), s3 ^ low, (high ^ TOKEN_DOMAIN).expand_as(tokens_BV))
    lane = tokens_BV & 3
    return torch.where(lane < 2, torch.where(lane == 0, out[0], out[1]), torch.where(lane == 2, out[2], out[3]))


