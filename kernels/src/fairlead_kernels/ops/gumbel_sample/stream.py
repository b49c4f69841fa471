"""The streams of noise behind gumbel_sample: constants and definitions that every backend follows bit for bit.

    state   keyed by context: the context state of prf's "philox" under the key (its first word starts as 574D4358)
            seeded: Philox((SEED_DOMAIN, position, position >> 32, 0), key = seed), position and seed as 64 bits
    word    of token v: lane v & 3 of Philox((v >> 2, s0, s1, s2), key xor (s3, TOKEN_DOMAIN << 32))
    u       ((word >> 8) + 1) / (2^24 + 1), divided in float64 and rounded once to float32: the float just below
            ((word >> 8) + 1) / 2^24, so never 0 and never 1
    g       -ln(-ln u)

With the seed of one stream equal to the key of the other, the two can share a state only if the first context token is
574D4358 xor 464C5331 = 11013B69 (285 million), beyond any vocabulary. kernel.c repeats SEED_DOMAIN.
"""

from __future__ import annotations

import torch

from ..prf.keys import unsigned_key
from ..prf.reference import MASK, TOKEN_DOMAIN, Words, context_state, philox4x32

SEED_DOMAIN = 0x464C5331


def seed_state(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> Words:
    """The state of (seed, position), four words [B]."""
    zero = torch.zeros_like(seeds_B)
    counter = (zero + SEED_DOMAIN, positions_B & MASK, (positions_B >> 32) & MASK, zero)
    return philox4x32(counter, seeds_B & MASK, (seeds_B >> 32) & MASK)


def row_words(
    vocabulary: int,
    context_BH: torch.Tensor | None,
    key: int,
    seeds_B: torch.Tensor | None,
    positions_B: torch.Tensor | None,
) -> torch.Tensor:
    """The word of every token of the vocabulary in every row's stream, int64 [B, V]."""
    if context_BH is not None:
        state = context_state(context_BH, key, "philox")
        low_B = torch.full_like(state[0], unsigned_key(key) & MASK)
        high_B = torch.full_like(state[0], unsigned_key(key) >> 32)
    elif seeds_B is not None and positions_B is not None:
        state = seed_state(seeds_B, positions_B)
        low_B, high_B = seeds_B & MASK, (seeds_B >> 32) & MASK
    else:
        raise ValueError("gumbel_sample: a context, or seeds and positions, are needed")
    tokens_BV = torch.arange(vocabulary, device=low_B.device).expand(low_B.shape[0], vocabulary)
    s0, s1, s2, s3 = (word[:, None].expand_as(tokens_BV) for word in state)
    out = philox4x32((tokens_BV >> 2, s0, s1, s2), s3 ^ low_B[:, None], (high_B ^ TOKEN_DOMAIN)[:, None].expand_as(s0))
    lane = tokens_BV & 3
    return torch.where(lane < 2, torch.where(lane == 0, out[0], out[1]), torch.where(lane == 2, out[2], out[3]))


def uniforms(words: torch.Tensor) -> torch.Tensor:
    """u in (0, 1), float32."""
    return (((words >> 8) + 1).double() / ((1 << 24) + 1)).float()


def gumbel_noise(words: torch.Tensor) -> torch.Tensor:
    """g = -ln(-ln u) in float64."""
    return -(-uniforms(words).double().log()).log()
