"""gumbel_score in plain torch, float64."""

from __future__ import annotations

import torch

from ..green_count.reference import extend, fingerprint, first_occurrences, scorable
from ..gumbel_sample.stream import uniforms
from ..prf.reference import context_state, philox_words

Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tally(scores_BT: torch.Tensor, fingerprint_BT: torch.Tensor | None, valid_BT: torch.Tensor) -> Scores:
    """Sums, counts and per-token scores; fingerprints None = no dedup."""
    if fingerprint_BT is not None:
        valid_BT = first_occurrences(fingerprint_BT, valid_BT)
    kept_BT = scores_BT.masked_fill(~valid_BT, torch.nan)
    return kept_BT.nansum(1), valid_BT.sum(1), kept_BT


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
    ids_N1 = ids_BT.reshape(-1, 1) & 0xFFFFFFFF
    windows_NH = ids_N1[:, :0]
    if context_width:
        windows_NH = extended.unfold(1, context_width, 1)[:, :tokens].reshape(-1, context_width)
    state = context_state(windows_NH, key, "philox")
    scores_BT = -torch.log1p(-uniforms(philox_words(state, ids_N1, key)).double()).reshape(batch, tokens)
    draw_N = fingerprint(state[0], state[1], ids_N1[:, 0] if dedup == "pair" else None)
    return tally(scores_BT, None if dedup == "none" else draw_N.reshape(batch, tokens), valid_BT)
