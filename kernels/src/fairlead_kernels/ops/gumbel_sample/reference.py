"""gumbel_sample and gumbel_uniform in plain torch, in float64."""

from __future__ import annotations

import math

import torch

from ..prf.reference import context_state, philox_words
from .stream import gumbel_noise, row_words, uniforms

BAD_ROW = -2
Drawn = tuple[torch.Tensor, torch.Tensor]


def cutoff(scaled_BV: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The smallest scaled logit that truncation keeps, [B]; -inf where everything stays. The largest is 0."""
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
        least_B = least_B.clamp(min=math.log(min_p))
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
    raw_BV = logits_BV.double()
    top_B = raw_BV.amax(1)
    bad_B = ~(top_B.abs() < math.inf)  # NaN, +inf, or nothing but -inf
    raw_BV = raw_BV.masked_fill(bad_B[:, None], 0.0)
    scale = temperature if temperature_B is None else temperature_B.double()[:, None]
    scaled_BV = (raw_BV - raw_BV.amax(1, keepdim=True)) / scale
    kept_BV = scaled_BV.masked_fill(scaled_BV < cutoff(scaled_BV, top_k, top_p, min_p)[:, None], -math.inf)
    ids_B = (kept_BV + gumbel_noise(row_words(vocabulary, context_BH, key, seeds, positions))).argmax(1)
    logprob_B = torch.zeros(batch, dtype=torch.float32, device=logits_BV.device)
    if want_logprob:
        logprob_B = kept_BV.log_softmax(1).gather(1, ids_B[:, None])[:, 0].float()
    ids_B = ids_B.masked_fill(bad_B, BAD_ROW)
    logprob_B = logprob_B.masked_fill(bad_B, 0.0)
    if rows is not None:
        ids_B, logprob_B = ids_B.masked_fill(~rows, -1), logprob_B.masked_fill(~rows, 0.0)
    return ids_B, logprob_B


def gumbel_uniform(context_BH: torch.Tensor, key: int, vocabulary: int) -> torch.Tensor:
    tokens_BV = torch.arange(vocabulary, device=context_BH.device).expand(context_BH.shape[0], vocabulary)
    return uniforms(philox_words(context_state(context_BH, key, "philox"), tokens_BV, key))
