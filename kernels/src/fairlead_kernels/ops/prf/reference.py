"""The keyed functions in plain torch, on int64 tensors that hold uint32 values.

The building blocks (context_state, philox_words, mix32_words) are what references of other operations stand on.
"""

from __future__ import annotations

import torch

from .keys import unsigned_key

MASK = 0xFFFFFFFF
DOMAIN = {"philox": 0x574D4358, "mix32": 0x464C4731}
TOKEN_DOMAIN = 0x574D544B
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key0: torch.Tensor | int, key1: torch.Tensor | int) -> Words:
    """Philox-4x32-10. The 64-bit products wrap in int64; shift and mask recover their upper half."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((right >> 32) & MASK) ^ c1 ^ key0, right & MASK
        c2, c3 = ((left >> 32) & MASK) ^ c3 ^ key1, left & MASK
        key0, key1 = (key0 + 0x9E3779B9) & MASK, (key1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def context_state(context_BH: torch.Tensor, key: int, function: str) -> Words:
    """Four words per row: the context absorbed in blocks of four, short blocks padded with FFFFFFFF - position."""
    rows, width = context_BH.shape
    key0, key1 = unsigned_key(key) & MASK, unsigned_key(key) >> 32
    state = [
        torch.full((rows,), word, dtype=torch.int64, device=context_BH.device)
        for word in (DOMAIN[function], width, 0, 0)
    ]
    if width == 0:
        return philox4x32((state[0], state[1], state[2], state[3]), key0, key1)
    for offset in range(0, width, 4):
        for i in range(4):
            word = context_BH[:, offset + i] & MASK if offset + i < width else MASK - i
            state[i] = state[i] ^ word
        state = list(philox4x32((state[0], state[1], state[2], state[3]), key0 ^ offset, key1))
    return state[0], state[1], state[2], state[3]


def philox_words(state: Words, tokens_BN: torch.Tensor, key: int) -> torch.Tensor:
    """Word token & 3 of the Philox call of block token >> 2."""
    key0, key1 = unsigned_key(key) & MASK, unsigned_key(key) >> 32
    s0, s1, s2, s3 = (word[:, None].expand_as(tokens_BN) for word in state)
    tokens_BN = tokens_BN & MASK
    out = philox4x32((tokens_BN >> 2, s0, s1, s2), s3 ^ key0, key1 ^ TOKEN_DOMAIN)
    lane = tokens_BN & 3
    return torch.where(lane < 2, torch.where(lane == 0, out[0], out[1]), torch.where(lane == 2, out[2], out[3]))


def scramble(h: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser M of mix32."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK
    return h ^ (h >> 16)


def mix32_words(a: torch.Tensor, b: torch.Tensor, tokens_BN: torch.Tensor) -> torch.Tensor:
    """M(M(token xor a) + b), with a and b of shape [B] (or broadcastable after one more dimension)."""
    return scramble((scramble((tokens_BN & MASK) ^ a[..., None]) + b[..., None]) & MASK)


def prf(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, function: str) -> torch.Tensor:
    state = context_state(context_BH, key, function)
    if function == "philox":
        return philox_words(state, tokens_BN, key)
    return mix32_words(state[0], state[1], tokens_BN)
