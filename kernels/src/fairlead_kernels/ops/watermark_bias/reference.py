"""Green lists in plain torch: `green_mask` for given tokens, and the bias on top of it."""

from __future__ import annotations

import math

import torch

from ..prf.reference import context_state, mix32_words


def threshold(gamma: float) -> int:
    """T = floor(gamma 2^32): a word below it is green."""
    return int(gamma * 4294967296.0)


def empty_state(like_BH: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of the empty context, one element each."""
    state = context_state(like_BH.new_zeros((1, 0)), key, "mix32")
    return state[0], state[1]


def token_states(tokens: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of each token as a context of one, in the shape of `tokens`."""
    state = context_state(tokens.reshape(-1, 1), key, "mix32")
    return state[0].reshape(tokens.shape), state[1].reshape(tokens.shape)


def smallest_token(context_BH: torch.Tensor, key: int) -> torch.Tensor:
    """minhash: the context token of smallest word_()(w), ties to the first."""
    a, b = empty_state(context_BH, key)
    words_BH = mix32_words(a, b, context_BH)
    return context_BH.gather(1, words_BH.argmin(1, keepdim=True))[:, 0]


def selfhash_minimum(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int) -> torch.Tensor:
    """selfhash: m(v), the smallest word of the token over the empty context and each context token alone."""
    a, b = empty_state(context_BH, key)
    smallest_BN = mix32_words(a, b, tokens_BN)
    a_BH, b_BH = token_states(context_BH, key)
    for i in range(context_BH.shape[1]):
        smallest_BN = torch.minimum(smallest_BN, mix32_words(a_BH[:, i], b_BH[:, i], tokens_BN))
    return smallest_BN


def green_mask(context_BH: torch.Tensor, tokens_BN: torch.Tensor, key: int, gamma: float, scheme: str) -> torch.Tensor:
    """Which tokens are green after their row's context, bool [B, N]."""
    if scheme == "selfhash":
        a, b = empty_state(context_BH, key)
        words_BN = mix32_words(a, b, selfhash_minimum(context_BH, tokens_BN, key))
    elif scheme == "minhash":
        a, b = token_states(smallest_token(context_BH, key), key)
        words_BN = mix32_words(a, b, tokens_BN)
    else:
        state = context_state(context_BH, key, "mix32")
        words_BN = mix32_words(state[0], state[1], tokens_BN)
    return words_BN < threshold(gamma)


def watermark_bias(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    key: int,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    batch, vocabulary = logits_BV.shape
    if logits_BV.numel() == 0:
        return logits_BV.clone(memory_format=torch.contiguous_format)
    tokens_BV = torch.arange(vocabulary, device=logits_BV.device).expand(batch, vocabulary)
    green_BV = green_mask(context_BH, tokens_BV, key, gamma, scheme)
    wide_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if math.isinf(delta):
        biased_BV = wide_BV.masked_fill(~green_BV & ~wide_BV.isnan(), -math.inf)
    else:
        biased_BV = torch.where(green_BV, wide_BV + delta, wide_BV)
    if rows is not None:
        biased_BV = torch.where(rows[:, None], biased_BV, wide_BV)
    return biased_BV.to(logits_BV.dtype).contiguous()


def watermark_bias_(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    key: int,
    gamma: float,
    delta: float,
    scheme: str,
    rows: torch.Tensor | None,
) -> None:
    logits_BV.copy_(watermark_bias(logits_BV, context_BH, key, gamma, delta, scheme, rows))


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
    out.copy_(watermark_bias(logits_BV, context_BH, key, gamma, delta, scheme, rows))
