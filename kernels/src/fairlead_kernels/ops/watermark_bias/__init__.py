"""Soft and hard green lists in one pass over the logits: l'_v = l_v + delta * [v is green after the context].

Kirchenbauer et al. 2023 (arXiv:2301.10226), with lists drawn by the counter-based function mix32 of `prf` instead of a
permutation: word(v) < floor(gamma 2^32) makes v green, so list sizes are binomial and nothing of length V is stored.
With word_c the mix32 word after context c (Kirchenbauer et al. 2024, arXiv:2306.04634, for the second and third):
  lefthash  green iff word_(w_1..w_h)(v) < T
  minhash   green iff word_(w*)(v) < T, w* = the context token of smallest word_()(w), ties to the first
  selfhash  green iff word_()(m(v)) < T, m(v) = min of word_()(v) and word_(w_i)(v) over the context tokens
A missing context token (-1) counts as the token 2^32 - 1.
"""

from __future__ import annotations

import math

import torch

from ... import checks, library
from ..prf.keys import signed_key
from .spec import SPECS

library.define(SPECS)
_functional = torch.ops.fairlead.watermark_bias.default
_in_place = torch.ops.fairlead.watermark_bias_.default
_to_out = torch.ops.fairlead.watermark_bias_out.default
FLOAT32_MAX = torch.finfo(torch.float32).max
SCHEMES = ("lefthash", "minhash", "selfhash")

__all__ = ["watermark_bias"]


def watermark_bias(
    logits_BV: torch.Tensor,
    context_BH: torch.Tensor,
    *,
    key: int,
    gamma: float = 0.25,
    delta: float = 2.0,
    scheme: str = "lefthash",
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add delta to the green tokens of each row's context; delta = inf makes every red token -inf (a hard list).

    logits_BV: float32, float16, bfloat16 (float64 by the reference), any strides; the sum is made in float32 and
    rounded once. -inf stays -inf, NaN stays NaN. context_BH: integer ids, oldest first, -1 = missing; selfhash with a
    context width of h counts the candidate, so H = h - 1. key: in [0, 2^64). gamma: share of green tokens, in (0, 1).
    rows: bool [B], False = leave this row alone. out: written and returned; `out=logits_BV` works in place (other
    overlaps of the two do not). Differentiable without `out` (red tokens of a hard list have no gradient).
    ValueError / TypeError on anything else.
    """
    if not isinstance(logits_BV, torch.Tensor) or logits_BV.dim() != 2 or not logits_BV.dtype.is_floating_point:
        raise TypeError(f"logits_BV: floats [batch, vocabulary] are needed, not {checks.describe(logits_BV)}")
    context_BH = checks.ids(context_BH, "context_BH", "batch, context")
    checks.beside(context_BH, "context_BH", logits_BV, "logits_BV")
    gamma, delta = checks.share(gamma), checks.number(delta, "delta")
    if not (0 <= delta <= FLOAT32_MAX or delta == math.inf):
        raise ValueError(f"delta: 0 or more and a float32 (inf = hard list) is needed, not {delta}")
    checks.one_of(scheme, "scheme", SCHEMES)
    if scheme == "minhash" and context_BH.shape[1] == 0:
        raise ValueError("context_BH: minhash needs at least one context token")
    if rows is not None:
        rows = checks.per_row(rows, "rows", "bool", logits_BV)
    settings = (context_BH, signed_key(key), gamma, delta, scheme, rows)
    if out is None:
        biased_BV: torch.Tensor = _functional(logits_BV, *settings)
        return biased_BV
    if out is logits_BV:
        _in_place(logits_BV, *settings)
        return out
    if not isinstance(out, torch.Tensor) or out.shape != logits_BV.shape or out.dtype != logits_BV.dtype:
        raise ValueError(f"out: {checks.describe(logits_BV)} is needed, not {checks.describe(out)}")
    checks.beside(out, "out", logits_BV, "logits_BV")
    _to_out(logits_BV, *settings, out)
    return out
