"""green_count in plain torch, and the pieces that the Triton launch shares: extended rows, scorable tokens, dedup."""

from __future__ import annotations

import torch

from ..prf.reference import context_state, mix32_words
from ..watermark_bias.reference import empty_state, selfhash_minimum, smallest_token, threshold, token_states

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
Counts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def columns(context_width: int, scheme: str) -> int:
    """Context tokens before the candidate."""
    return context_width - (scheme == "selfhash")


def extend(ids_BT: torch.Tensor, context_BH: torch.Tensor | None, width: int) -> torch.Tensor:
    """The rows after `width` ids, -1 where none is known: the context of token t is at [t, t + width)."""
    known = ids_BT.new_zeros((ids_BT.shape[0], 0)) if context_BH is None else context_BH
    known = known[:, max(0, known.shape[1] - width) :] if width else known[:, :0]
    missing = ids_BT.new_full((ids_BT.shape[0], width - known.shape[1]), -1)
    return torch.cat([missing, known, ids_BT], 1)


def scorable(
    extended: torch.Tensor, lengths_B: torch.Tensor | None, width: int, tokens: int, pad_left: bool
) -> torch.Tensor:
    """Tokens inside their row, with an id and (unless pad_left) a whole context, bool [B, T]."""
    valid_BT = extended[:, width:] >= 0
    if lengths_B is not None:
        valid_BT = valid_BT & (torch.arange(tokens, device=extended.device) < lengths_B[:, None])
    if not pad_left and width:
        valid_BT = valid_BT & (extended.unfold(1, width, 1)[:, :tokens] >= 0).all(2)
    return valid_BT


def first_occurrences(fingerprint_BT: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """The valid tokens whose fingerprint no earlier valid token of the row has. Two stable sorts: valid tokens first,
    then by fingerprint, so each group starts with its earliest valid token."""
    if valid_BT.shape[1] == 0:
        return valid_BT
    order_BT = (~valid_BT).to(torch.int8).sort(dim=1, stable=True).indices
    sorted_BT, inner_BT = fingerprint_BT.gather(1, order_BT).sort(dim=1, stable=True)
    order_BT = order_BT.gather(1, inner_BT)
    new_BT = torch.ones_like(valid_BT)
    new_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    return valid_BT & torch.empty_like(valid_BT).scatter_(1, order_BT, new_BT)


def tally(green_BT: torch.Tensor, fingerprint_BT: torch.Tensor | None, valid_BT: torch.Tensor) -> Counts:
    """Counts and marks from green bits, fingerprints (None = no dedup) and scorable tokens."""
    if fingerprint_BT is not None:
        valid_BT = first_occurrences(fingerprint_BT, valid_BT)
    marks_BT = torch.where(valid_BT, green_BT.to(torch.int8), torch.full_like(green_BT, -1, dtype=torch.int8))
    return (marks_BT == 1).sum(1), valid_BT.sum(1), marks_BT


def fingerprint(s0: torch.Tensor, s1: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """64 bits of (context, token), or of the context alone."""
    bits = (s0 << 32) | s1
    return bits if tokens is None else bits + tokens * GOLDEN


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
    ids_N1 = ids_BT.reshape(-1, 1) & 0xFFFFFFFF
    windows_NH = ids_N1[:, :0]
    if width:
        windows_NH = extended.unfold(1, width, 1)[:, :tokens].reshape(-1, width)
    state = context_state(windows_NH, key, "mix32")
    if scheme == "selfhash":
        minimum_N1 = selfhash_minimum(windows_NH, ids_N1, key)
        words_N1 = mix32_words(*empty_state(windows_NH, key), minimum_N1)
        draw_N = minimum_N1[:, 0]
    else:
        a_N, b_N = token_states(smallest_token(windows_NH, key), key) if scheme == "minhash" else (state[0], state[1])
        words_N1 = mix32_words(a_N, b_N, ids_N1)
        draw_N = fingerprint(a_N, b_N, ids_N1[:, 0])
        state = (a_N, b_N, state[2], state[3])
    if dedup == "context":
        draw_N = fingerprint(state[0], state[1], None)
    green_BT = (words_N1 < threshold(gamma)).reshape(batch, tokens)
    return tally(green_BT, None if dedup == "none" else draw_N.reshape(batch, tokens), valid_BT)
